import { Random, type WidePrecision } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { assertNearCpu, exact, onCuda, output } from '../../test-against-cpu.ts'
import { unavailable } from '../../test-backend.ts'

interface Size {
  readonly name: string
  readonly sizes: readonly [B: number, T: number, J: number, D: number, S: number]
  readonly limits?: readonly number[]
}

// The choice of a tile depends on the number of multiprocessors; these sizes are for the emulator's four.
const cases: readonly Size[] = [
  { name: 'heads of V3.2, tiles of 128 x 128', sizes: [2, 5, 64, 128, 260] },
  { name: 'heads of V3.2, one query', sizes: [1, 1, 64, 128, 130] },
  { name: 'heads of GLM-5, tiles of 64 x 64', sizes: [1, 3, 32, 128, 190] },
  { name: 'more heads than a tile has columns', sizes: [1, 3, 150, 40, 70] },
  { name: 'odd sizes', sizes: [3, 3, 5, 33, 67] },
  { name: 'limits', sizes: [1, 4, 64, 24, 300], limits: [1, 128, 129, 400] },
  { name: 'limits that hide whole tiles from both queries', sizes: [2, 2, 6, 16, 300], limits: [0, -5, 64, 3] },
  { name: 'many queries of few keys', sizes: [2, 37, 40, 128, 70] },
]

describe.skipIf(unavailable)('indexScores', () => {
  describe.each(['f32', 'bf16'] as const satisfies WidePrecision[])('%s', precision => {
    test.each(cases)('$name', async ({ sizes: [B, T, J, D, S], limits }) => {
      const random = new Random(D)
      const inputs = [exact(random, B, T, J, D), exact(random, B, T, J), exact(random, B, S, D)]
      const seen = limits ? [{ data: [...limits], shape: [B, T], dtype: 'i32' as const }] : []
      await assertNearCpu('indexScores', [...inputs, ...seen], { precision }, [output(B, T, S)], 2e-6)
    })

    test.each(cases)('gradients: $name', async ({ sizes: [B, T, J, D, S], limits }) => {
      const random = new Random(D)
      // Multiples of 1/8, whose products are exact, so that none changes its sign.
      const given = (...shape: number[]) => {
        const { data } = exact(random, ...shape)
        return { data: Float32Array.from(data as Float32Array, x => Math.round(8 * x) / 8), shape }
      }
      const inputs = [given(B, T, J, D), exact(random, B, T, J), given(B, S, D), exact(random, B, T, S)]
      const seen = limits ? [{ data: [...limits], shape: [B, T], dtype: 'i32' as const }] : []
      const outputs = [output(B, T, J, D), output(B, T, J), output(B, S, D)]
      // In bf16, the gradients of products are rounded.
      const tolerance = precision === 'bf16' ? 4e-3 : 2e-6
      await assertNearCpu('indexScoresBackward', [...inputs, ...seen], { precision }, outputs, tolerance)
    })

    test('NaN and infinities affect only their queries and keys', async () => {
      const [T, J, D, S] = [3, 2, 8, 70]
      const q = new Float32Array(T * J * D).fill(1)
      const k = new Float32Array(S * D).fill(1)
      q[J * D + 3] = Number.NaN
      k[65 * D] = Number.NEGATIVE_INFINITY
      k[66 * D] = Number.POSITIVE_INFINITY
      const inputs = [
        { data: q, shape: [1, T, J, D] },
        { data: new Float32Array(T * J).fill(0.5), shape: [1, T, J] },
        { data: k, shape: [1, S, D] },
      ]
      const [scores] = await onCuda('indexScores', inputs, { precision }, [output(1, T, S)])
      const expected = Array.from({ length: T * S }, (_, at) => {
        const [t, s] = [Math.floor(at / S), at % S]
        if (t === 1) return Number.NaN
        return s === 65 ? 0 : s === 66 ? Number.POSITIVE_INFINITY : D
      })
      expect(Array.from(scores)).toEqual(expected)
    })
  })
})
