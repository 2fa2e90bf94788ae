import {
  type AdamwAttrs,
  type DType,
  decodeHost,
  encodeHost,
  type HostArray,
  Random,
  toBf16,
  type Value,
} from '@moe/core'
import { assertClose } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'

const attrs: AdamwAttrs = { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 }

/** Expects the stored moments to be the exact ones rounded to `dtype`. */
function expectRounded(dtype: 'f32' | 'bf16', stored: HostArray, exact: Float64Array): void {
  if (dtype === 'f32') {
    assertClose('moments', stored, exact)
    return
  }
  const differences = Int32Array.from(stored, (bits, i) => Math.abs(bits - toBf16(exact[i]))).filter(codes => codes > 0)
  // About once in 2^14 times, an f32 sum is on the other side of a rounding tie and gives the neighbouring value.
  expect(differences.length).toBeLessThanOrEqual(stored.length / 2000)
  expect(differences.every(codes => codes === 1)).toBe(true)
}

describe.skipIf(unavailable)('adamwStep', () => {
  const sizes = [0, 1, 35, 20_001]
  test.each((['f32', 'bf16'] as const).flatMap(dtype => sizes.map(n => [n, dtype] as const)))(
    'updates %i elements in place over three steps, moments in %s',
    async (n, dtype) => {
      const random = new Random(9)
      const backend = await testBackend()
      const value = (data: Float32Array, dtype: DType = 'f32', shape = [n]): Value => {
        return { handle: backend.upload(encodeHost(dtype, data), shape, dtype), shape, dtype }
      }
      const start = random.normal(n)
      const p = Float64Array.from(start)
      const none = new Float32Array(n)
      let [m, v]: ArrayLike<number>[] = [none, none]
      let state = [value(start), value(none, dtype), value(none, dtype)]
      const scale = value(Float32Array.of(0.5), 'f32', [])
      const bytes = backend.stats().bytes
      for (let step = 1; step <= 3; step++) {
        const grad = random.normal(n)
        const moments = [new Float64Array(n), new Float64Array(n)]
        for (let i = 0; i < n; i++) {
          const g = grad[i] * 0.5
          const first = 0.9 * m[i] + 0.1 * g
          const second = 0.95 * v[i] + 0.05 * g * g
          p[i] -= 0.01 * 0.1 * p[i]
          p[i] -= (0.01 * (first / (1 - 0.9 ** step))) / (Math.sqrt(second / (1 - 0.95 ** step)) + 1e-8)
          moments[0][i] = first
          moments[1][i] = second
        }
        const g = value(grad)
        const [param, first, second] = state
        const handles = backend.fused.adamwStep?.([param, g, first, second, scale], { ...attrs, step }, state) ?? []
        for (const { handle } of [...state, g]) backend.free(handle)
        state = handles.map((handle, i) => ({ ...state[i], handle }))
        const stored = await Promise.all(state.slice(1).map(backend.download))
        for (const [i, exact] of moments.entries())
          expectRounded(dtype, stored[i], exact)
          // The next step starts from the stored values.
        ;[m, v] = stored.map(data => decodeHost(dtype, data))
      }
      expect(backend.stats().bytes).toBe(bytes)
      assertClose('p', await backend.download(state[0]), p)
      backend.dispose()
    },
  )

  test('does not change a tensor that has another owner', async () => {
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
