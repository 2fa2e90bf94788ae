import { attention, type Backend, Random } from '@moe/core'
import { compareWithReference, runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend } from '../test-gpu.ts'
import { integers, normal } from '../test-inputs.ts'

interface Sizes {
  readonly B?: number
  readonly T: number
  readonly S?: number
  readonly H?: number
  readonly G?: number
  readonly Dk: number
  readonly Dv: number
  readonly causal?: boolean
}

const inputsOf = ({ B = 1, T, S = T, H = 1, G = H, Dk, Dv }: Sizes) => [
  normal([B, T, H, Dk]),
  normal([B, S, G, Dk], 0.9),
  normal([B, S, G, Dv], 1.1),
]

const cases: readonly Sizes[] = [
  // Heads of DeepSeek-V3.
  { T: 40, H: 2, Dk: 192, Dv: 128 },
  { T: 1, S: 70, Dk: 192, Dv: 128 },
  // The largest supported heads, and heads that are not multiples of a vector.
  { T: 40, H: 2, Dk: 256, Dv: 256 },
  { T: 70, S: 100, H: 2, G: 1, Dk: 255, Dv: 193 },
  { B: 2, T: 20, S: 70, Dk: 256, Dv: 12, causal: false },
  { T: 20, Dk: 191, Dv: 129 },
  { T: 33, Dk: 128, Dv: 192 },
  // Near the size of a block of queries and of a tile of keys.
  ...[17, 31, 32, 33, 63, 64, 65].map(T => ({ T, Dk: 12, Dv: 8 })),
  { T: 18, S: 128, Dk: 4, Dv: 4 },
  { T: 18, S: 129, Dk: 5, Dv: 3, H: 2 },
  { T: 97, S: 66, Dk: 8, Dv: 8 },
  { B: 2, T: 37, S: 41, H: 6, G: 2, Dk: 16, Dv: 20 },
  { B: 2, T: 70, S: 35, H: 4, G: 1, Dk: 16, Dv: 65, causal: false },
]

const backend = (await testBackend()) as Backend

describe.skipIf(backend === null)('tiled attention', () => {
  test.each(cases)('$T queries, $S keys, $Dk and $Dv features, $H heads, $G key heads', async sizes => {
    const { causal = true } = sizes
    await compareWithReference(backend, inputsOf(sizes), (q, k, v) => [attention(q, k, v, { causal })])
  })

  test.each([0, 1, 2, 3])('matches the reference for random lengths and starts, seed %i', async seed => {
    const random = new Random(seed)
    const [B, T, S] = [3, 20 + random.integer(60), 20 + random.integer(120)]
    const lengths = [0, random.integer(S + 1), S]
    const starts = Array.from({ length: B * T }, () => random.integer(S + 20) - 10)
    starts[0] = -(2 ** 31)
    starts[1] = 2 ** 31 - 1
    const inputs = [...inputsOf({ B, T, S, H: 2, G: 1, Dk: 12, Dv: 4 }), integers(lengths), integers(starts, [B, T])]
    await compareWithReference(backend, inputs, (q, k, v, l, s) => {
      return [attention(q, k, v, { lengths: l, starts: s, causal: seed % 2 === 0 })]
    })
  })

  test('skips tiles of other packed texts', async () => {
    const [T, D] = [128, 8]
    const half = (T * D) / 2
    const starts = Array.from({ length: T }, (_, t) => (t < T / 2 ? 0 : T / 2))
    const [q, k, v, dout] = [1, 2, 3, 4].map(seed => {
      const data = new Random(seed).normal(T * D)
      return { data: data.fill(Number.NaN, 0, half), shape: [1, T, 1, D] }
    })
    const ranges = [integers([T]), integers(starts, [1, T])]
    const like = { shape: [1, T, 1, D], dtype: 'f32' } as const
    const lseSpec = { shape: [1, 1, T], dtype: 'f32' } as const
    const attrs = { causal: true, scale: 1, precision: 'f32' } as const
    const [out, lse] = await runOp(backend, 'attention', [q, k, v, ...ranges], attrs, [like, lseSpec])
    const given = [q, k, v, { data: out, shape: like.shape }, { data: lse, shape: lseSpec.shape }, dout, ...ranges]
    const found = await runOp(backend, 'attentionBackward', given, attrs, [like, like, like])
    for (const values of [out, ...found]) expect([...values.slice(half)].every(Number.isFinite)).toBe(true)
    expect(Number.isNaN(found[0][0])).toBe(true)
  })

  test('NaN in a sequence does not affect the previous one', async () => {
    const [T, D] = [40, 8]
    const shape = [2, T, 1, D]
    const [q, k, v, dout] = [1, 2, 3, 4].map(seed => {
      return { data: new Random(seed).normal(2 * T * D).fill(Number.NaN, T * D), shape }
    })
    const attrs = { causal: false, scale: 1, precision: 'f32' } as const
    const lseSpec = { shape: [2, 1, T], dtype: 'f32' } as const
    const like = { shape, dtype: 'f32' } as const
    const [out, lse] = await runOp(backend, 'attention', [q, k, v], attrs, [like, lseSpec])
    const given = [q, k, v, { data: out, shape }, { data: lse, shape: lseSpec.shape }, dout]
    const found = await runOp(backend, 'attentionBackward', given, attrs, [like, like, like])
    for (const values of [out, ...found]) {
      expect([...values.slice(0, T * D)].every(Number.isFinite)).toBe(true)
      expect([...values.slice(T * D)].every(Number.isNaN)).toBe(true)
    }
  })

  test('a NaN score makes only its query NaN', async () => {
    const [T, D] = [40, 4]
    const [q, k, v] = inputsOf({ T, Dk: D, Dv: D })
    const data = Float32Array.from(q.data)
    data[7 * D] = Number.NaN
    const outputs = [
      { shape: [1, T, 1, D], dtype: 'f32' },
      { shape: [1, 1, T], dtype: 'f32' },
    ] as const
    const attrs = { causal: true, scale: 1, precision: 'f32' } as const
    const [y, lse] = await runOp(backend, 'attention', [{ ...q, data }, k, v], attrs, outputs)
    const rows = Array.from({ length: T }, (_, t) => Number.isNaN(y[t * D]))
    expect(rows).toEqual(Array.from({ length: T }, (_, t) => t === 7))
    expect(Number.isNaN(lse[7])).toBe(true)
  })

  test('declines more than 256 features', async () => {
    const attrs = { causal: true, scale: 1, precision: 'f32' } as const
    const inputs = inputsOf({ T: 20, Dk: 257, Dv: 8 })
    await expect(runOp(backend, 'attention', inputs, attrs, [])).rejects.toThrow('declined')
  })
})
