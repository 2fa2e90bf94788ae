import { type AdamwAttrs, Random, type Value } from '@moe/core'
import { assertClose } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

const attrs: AdamwAttrs = { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 }

describe.skipIf(unavailable)('adamwStep', () => {
  test.each([0, 1, 33, 20_001])('three steps of %i elements, in place', async n => {
    const random = new Random(9)
    const backend = await testBackend()
    const value = (data: Float32Array, shape = [n]): Value => {
      return { handle: backend.upload(data, shape, 'f32'), shape, dtype: 'f32' }
    }
    const start = random.normal(n)
    const p = Float64Array.from(start)
    const [m, v] = [new Float64Array(n), new Float64Array(n)]
    let state = [value(start), value(new Float32Array(n)), value(new Float32Array(n))]
    const scale = value(Float32Array.of(0.5), [])
    const bytes = backend.stats().bytes
    for (let step = 1; step <= 3; step++) {
      const grad = random.normal(n)
      for (let i = 0; i < n; i++) {
        const g = grad[i] * 0.5
        m[i] = 0.9 * m[i] + 0.1 * g
        v[i] = 0.95 * v[i] + 0.05 * g * g
        p[i] -= 0.01 * 0.1 * p[i]
        p[i] -= (0.01 * (m[i] / (1 - 0.9 ** step))) / (Math.sqrt(v[i] / (1 - 0.95 ** step)) + 1e-8)
      }
      const g = value(grad)
      const [param, first, second] = state
      const handles = backend.fused.adamwStep?.([param, g, first, second, scale], { ...attrs, step }, state) ?? []
      for (const { handle } of [...state, g]) backend.free(handle)
      state = handles.map(handle => ({ handle, shape: [n], dtype: 'f32' }))
    }
    expect(backend.stats().bytes).toBe(bytes)
    const got = await Promise.all(state.map(backend.download))
    for (const [i, want] of [p, m, v].entries()) assertClose(['p', 'm', 'v'][i], got[i], want)
    backend.dispose()
  })

  test('a tensor that somebody else holds is not changed', async () => {
    const backend = await testBackend()
    const shape = [2]
    const make = (...data: number[]): Value => {
      return { handle: backend.upload(Float32Array.from(data), shape, 'f32'), shape, dtype: 'f32' }
    }
    const [param, grad, m, v] = [make(1, 2), make(3, 4), make(0, 0), make(0, 0)]
    const scale: Value = { handle: backend.upload(Float32Array.of(1), [], 'f32'), shape: [], dtype: 'f32' }
    const [alias] = backend.primitives.reshape([param], {}, [param])
    const [next] = backend.fused.adamwStep?.([param, grad, m, v, scale], attrs, [param, m, v]) ?? []
    expect(await backend.download({ ...param, handle: next })).not.toEqual(Float32Array.of(1, 2))
    expect(await backend.download({ ...param, handle: alias })).toEqual(Float32Array.of(1, 2))
    backend.dispose()
  })
})
