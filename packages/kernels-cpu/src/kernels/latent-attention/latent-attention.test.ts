import { decodeHost, encodeHost, Random, type WidePrecision } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { CpuOptions } from '../../backend.ts'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { plainAttention } from '../attention/test-attention.ts'
import { worstError } from '../worst-error.ts'

const cases = [
  { B: 1, T: 1, S: 40, H: 8, C: 80, valueDim: 64, lengths: [33] },
  { B: 1, T: 1, S: 1200, H: 4, C: 576, valueDim: 512, lengths: [1111] },
  { B: 3, T: 2, S: 800, H: 5, C: 21, valueDim: 13, lengths: [2, 0, 800] },
  { B: 1, T: 70, S: 100, H: 2, C: 48, valueDim: 32, lengths: [100] },
  { B: 2, T: 1, S: 1000, H: 65, C: 24, valueDim: 16, lengths: [400, 900] },
]

/** Plain loops are slow: once per case. */
const known: Record<CacheDType, Map<object, Float64Array>> = { f32: new Map(), bf16: new Map() }

type CacheDType = 'f32' | 'bf16'

async function run(
  c: (typeof cases)[number],
  precision: WidePrecision,
  options: CpuOptions,
  dtype: CacheDType = 'f32',
) {
  const { B, T, S, H, C, valueDim, lengths } = c
  const random = new Random(3)
  const q = random.normal(B * T * H * C)
  const exact = random.normal(B * S * C)
  const cache = decodeHost(dtype, encodeHost(dtype, exact)) as Float32Array
  // What lies behind the end of a sequence is never read.
  const given = cache.slice()
  lengths.forEach((n, b) => {
    given.fill(Number.NaN, (b * S + n) * C, (b + 1) * S * C)
  })
  const backend = await testBackend(options)
  const inputs = [
    { data: q, shape: [B, T, H, C] },
    { data: given, shape: [B, S, C], dtype },
    { data: lengths, shape: [B], dtype: 'i32' as const },
  ]
  const scale = C ** -0.5
  const [got] = await runOp(backend, 'latentAttention', inputs, { scale, valueDim, precision }, [
    { shape: [B, T, H, valueDim], dtype: 'f32' },
  ])
  backend.dispose()
  let expected = known[dtype].get(c)
  if (!expected) {
    const sizes = { B, T, S, H, G: 1, Dk: C, Dv: C }
    const { out } = plainAttention(sizes, q, cache, cache, { causal: true, scale, lengths })
    expected = out.filter((_, i) => i % C < valueDim)
    known[dtype].set(c, expected)
  }
  return { got, expected }
}

describe.each(await availableIsas())('%s', isa => {
  test.each(cases)('$B x $T x $H, $S keys of $C, values $valueDim', async c => {
    const f32 = await run(c, 'f32', { isa })
    expect(worstError(f32.got, f32.expected)).toBeLessThan(3e-6)
    const stored = await run(c, 'f32', { isa }, 'bf16')
    expect(worstError(stored.got, stored.expected)).toBeLessThan(3e-6)
    for (const dtype of ['f32', 'bf16'] as const) {
      const bf16 = await run(c, 'bf16', { isa }, dtype)
      expect(worstError(bf16.got, bf16.expected)).toBeLessThan(isa === 'avx512bf16' ? 2e-2 : 3e-6)
    }
  })

  test('the same bits with one and two threads', async () => {
    for (const c of cases) {
      for (const dtype of ['f32', 'bf16'] as const) {
        const { got } = await run(c, 'bf16', { isa, threads: 1 }, dtype)
        expect((await run(c, 'bf16', { isa, threads: 2 }, dtype)).got).toEqual(got)
      }
    }
  })
})
