import { type EmaAttrs, Random, type Value } from '@moe/core'
import { assertClose } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

const attrs: EmaAttrs = { decay: 0.9, step: 1 }

describe.skipIf(unavailable)('emaStep', () => {
  test.each([0, 1, 33, 20_001])('updates %i elements in place over three steps', async n => {
    const random = new Random(9)
    const backend = await testBackend()
    const shape = [n]
    const value = (data: Float32Array): Value => ({ handle: backend.upload(data, shape, 'f32'), shape, dtype: 'f32' })
    // The first step overwrites the previous contents.
    let average = value(random.normal(n))
    const sums = new Float64Array(n)
    const bytes = backend.stats().bytes
    let weights = 0
    for (let step = 1; step <= 3; step++) {
      const data = random.normal(n)
      for (let i = 0; i < n; i++) sums[i] = 0.9 * sums[i] + data[i]
      weights = 0.9 * weights + 1
      const x = value(data)
      const [handle] = backend.fused.emaStep?.([average, x], { ...attrs, step }, [average]) ?? []
      for (const { handle } of [average, x]) backend.free(handle)
      average = { ...average, handle }
    }
    expect(backend.stats().bytes).toBe(bytes)
    const exact = sums.map(sum => sum / weights)
    assertClose('average', await backend.download(average), exact)
    backend.dispose()
  })

  test('does not change a tensor that has another owner', async () => {
    const backend = await testBackend()
    const make = (...data: number[]): Value => {
      return { handle: backend.upload(Float32Array.from(data), [2], 'f32'), shape: [2], dtype: 'f32' }
    }
    const [average, value] = [make(1, 2), make(3, 4)]
    const [alias] = backend.primitives.reshape([average], {}, [average])
    const [next] = backend.fused.emaStep?.([average, value], attrs, [average]) ?? []
    expect(await backend.download({ ...average, handle: next })).toEqual(Float32Array.of(3, 4))
    expect(await backend.download({ ...average, handle: alias })).toEqual(Float32Array.of(1, 2))
    backend.dispose()
  })
})
