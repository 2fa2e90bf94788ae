import { type AttentionAttrs, Random, type TensorSpec, type WidePrecision } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { CpuOptions } from '../../backend.ts'
import { bf16Isas } from '../../load.ts'
import { availableIsas, type HostInput, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'
import { type AttentionSizes, plainAttention } from './test-attention.ts'

interface Case extends AttentionSizes {
  readonly causal: boolean
  readonly lengths?: readonly number[]
  readonly scale?: number
}

const cases: readonly Case[] = [
  { B: 2, T: 37, S: 37, H: 4, G: 2, Dk: 20, Dv: 12, causal: true },
  { B: 1, T: 256, S: 256, H: 2, G: 2, Dk: 48, Dv: 32, causal: true },
  { B: 1, T: 70, S: 200, H: 2, G: 1, Dk: 192, Dv: 128, causal: true },
  { B: 2, T: 33, S: 211, H: 2, G: 2, Dk: 32, Dv: 16, causal: false },
  { B: 2, T: 9, S: 13, H: 3, G: 3, Dk: 17, Dv: 5, causal: true, lengths: [4, 12] },
  { B: 3, T: 3, S: 100, H: 2, G: 1, Dk: 8, Dv: 8, causal: false, lengths: [0, 97, 100] },
  { B: 1, T: 1, S: 1, H: 1, G: 1, Dk: 1, Dv: 1, causal: true },
  { B: 1, T: 5, S: 3, H: 1, G: 1, Dk: 16, Dv: 16, causal: true },
  { B: 1, T: 2, S: 900, H: 8, G: 2, Dk: 33, Dv: 40, causal: true, lengths: [801] },
  { B: 2, T: 1, S: 1500, H: 1, G: 1, Dk: 64, Dv: 64, causal: true, lengths: [700, 1500] },
  { B: 1, T: 40, S: 40, H: 1, G: 1, Dk: 24, Dv: 24, causal: true, scale: -0.7 },
  { B: 1, T: 40, S: 40, H: 1, G: 1, Dk: 24, Dv: 24, causal: true, scale: 0 },
  { B: 1, T: 34, S: 50, H: 1, G: 1, Dk: 576, Dv: 512, causal: true },
  { B: 1, T: 33, S: 40, H: 2, G: 2, Dk: 256, Dv: 256, causal: true },
  // Few rows, with features along the lanes: alone, and next to whole vectors of 16, 8 or 4.
  { B: 1, T: 1, S: 51, H: 2, G: 2, Dk: 32, Dv: 16, causal: true },
  { B: 2, T: 1, S: 45, H: 4, G: 1, Dk: 64, Dv: 32, causal: true, lengths: [45, 18] },
  { B: 1, T: 3, S: 37, H: 1, G: 1, Dk: 32, Dv: 48, causal: true, scale: -0.7 },
  { B: 1, T: 3, S: 3, H: 1, G: 1, Dk: 48, Dv: 32, causal: true, scale: 0 },
  { B: 2, T: 5, S: 60, H: 4, G: 1, Dk: 64, Dv: 32, causal: true, lengths: [60, 3] },
  { B: 1, T: 1, S: 60, H: 10, G: 1, Dk: 192, Dv: 128, causal: true },
  { B: 1, T: 13, S: 60, H: 1, G: 1, Dk: 64, Dv: 32, causal: false },
  { B: 2, T: 1, S: 1500, H: 20, G: 1, Dk: 64, Dv: 32, causal: true, lengths: [700, 1411] },
  { B: 1, T: 2, S: 1500, H: 1, G: 1, Dk: 64, Dv: 32, causal: true, lengths: [1151] },
]

/** Expected results by case; computed once because plain loops are slow. */
const expectedByCase = new Map<Case, Float64Array[]>()

async function run(c: Case, precision: WidePrecision, options: CpuOptions) {
  const random = new Random(7)
  const { B, T, S, H, G, Dk, Dv } = c
  const input = (...shape: number[]): HostInput => ({ data: random.normal(shape.reduce((a, b) => a * b, 1)), shape })
  const [q, k, v, dout] = [input(B, T, H, Dk), input(B, S, G, Dk), input(B, S, G, Dv), input(B, T, H, Dv)]
  const scale = c.scale ?? Dk ** -0.5
  const attrs: AttentionAttrs = { causal: c.causal, scale, precision }
  const lengths: HostInput[] = c.lengths ? [{ data: c.lengths, shape: [B], dtype: 'i32' }] : []
  const spec = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })
  const backend = await testBackend(options)
  const forward = await runOp(backend, 'attention', [q, k, v, ...lengths], attrs, [spec(B, T, H, Dv), spec(B, H, T)])
  const saved: HostInput[] = [
    { data: forward[0], shape: [B, T, H, Dv] },
    { data: forward[1], shape: [B, H, T] },
  ]
  const backward = await runOp(backend, 'attentionBackward', [q, k, v, ...saved, dout, ...lengths], attrs, [
    spec(...q.shape),
    spec(...k.shape),
    spec(...v.shape),
  ])
  expect(backend.stats().handles).toBe(0)
  backend.dispose()
  const expected =
    expectedByCase.get(c) ?? Object.values(plainAttention(c, q.data, k.data, v.data, { ...c, scale }, dout.data))
  expectedByCase.set(c, expected)
  return { got: [...forward, ...backward], expected }
}

describe.each(await availableIsas())('attention on %s', isa => {
  test.each(cases)(
    'matches f64 loops in f32: $B x $T x $H/$G, $S keys, $Dk/$Dv, causal $causal, lengths $lengths',
    async c => {
      const { got, expected } = await run(c, 'f32', { isa })
      for (const [i, name] of ['out', 'lse', 'dq', 'dk', 'dv'].entries()) {
        expect(worstError(got[i], expected[i]), name).toBeLessThan(1e-5)
      }
    },
  )

  test.each(cases)(
    'matches f64 loops in bf16: $B x $T x $H/$G, $S keys, $Dk/$Dv, causal $causal, lengths $lengths',
    async c => {
      const { got, expected } = await run(c, 'bf16', { isa })
      for (const [i, name] of ['out', 'lse', 'dq', 'dk', 'dv'].entries()) {
        expect(worstError(got[i], expected[i]), name).toBeLessThan(bf16Isas.has(isa) ? 4e-2 : 1e-5)
      }
    },
  )

  test('results are bitwise equal in every run and with one and two threads', async () => {
    for (const precision of ['f32', 'bf16'] as const) {
      for (const c of [cases[0], cases[1], cases[8], cases[9], ...cases.slice(-2)]) {
        const { got } = await run(c, precision, { isa, threads: 1 })
        expect((await run(c, precision, { isa, threads: 2 })).got).toEqual(got)
        expect((await run(c, precision, { isa, threads: 2 })).got).toEqual(got)
      }
    }
  })

  test('handles empty batches, queries and keys', async () => {
    for (const c of [
      { ...cases[0], B: 0 },
      { ...cases[0], T: 0, S: 0 },
      { ...cases[0], T: 0 },
      { ...cases[0], causal: false, S: 0 },
    ]) {
      const { got, expected } = await run(c, 'f32', { isa })
      for (const i of got.keys()) expect(worstError(got[i], expected[i])).toBe(0)
    }
  })
})

test('large scores do not overflow, and NaN only affects its own row', async () => {
  const backend = await testBackend()
  const spec = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })
  const k = { data: [1000, 999, -1000, 0], shape: [1, 4, 1, 1] }
  const v = { data: [1, 2, 3, 4], shape: [1, 4, 1, 1] }
  const q = { data: [50, -50, Number.NaN, 0], shape: [1, 4, 1, 1] }
  const attrs: AttentionAttrs = { causal: false, scale: 1, precision: 'f32' }
  const [out, lse] = await runOp(backend, 'attention', [q, k, v], attrs, [spec(1, 4, 1, 1), spec(1, 1, 4)])
  expect(worstError(out, [1, 3, Number.NaN, 2.5])).toBeLessThan(1e-6)
  expect(lse[0]).toBe(50_000)
  expect(lse[1]).toBe(50_000)
  expect(lse[2]).toBeNaN()
  expect(lse[3]).toBeCloseTo(Math.log(4), 6)
  backend.dispose()
})
