import {
  decodeHost,
  encodeHost,
  fromHost,
  type HostArray,
  latentAttention,
  noGrad,
  Random,
  type WidePrecision,
} from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { CpuOptions } from '../../backend.ts'
import { bf16Isas } from '../../load.ts'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { plainAttention } from '../attention/test-attention.ts'
import { worstError } from '../worst-error.ts'

const cases = [
  { B: 1, T: 1, S: 40, H: 8, C: 80, valueDim: 64, lengths: [33] },
  { B: 1, T: 1, S: 1200, H: 4, C: 576, valueDim: 512, lengths: [1111] },
  { B: 3, T: 2, S: 800, H: 5, C: 21, valueDim: 13, lengths: [2, 0, 800] },
  { B: 1, T: 70, S: 100, H: 2, C: 48, valueDim: 32, lengths: [100] },
  { B: 2, T: 1, S: 1000, H: 65, C: 24, valueDim: 16, lengths: [400, 900] },
  // A whole vector of heads, and a few heads.
  { B: 1, T: 1, S: 130, H: 20, C: 96, valueDim: 64, lengths: [117] },
  { B: 2, T: 1, S: 1000, H: 20, C: 576, valueDim: 512, lengths: [3, 901] },
]

/** Expected results by case; computed once because plain loops are slow. */
const expectedByCase: Record<CacheDType, Map<object, Float64Array>> = { f32: new Map(), bf16: new Map() }

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
  // Rows after the end of a sequence are NaN and must never be read.
  const stored = cache.slice()
  lengths.forEach((n, b) => {
    stored.fill(Number.NaN, (b * S + n) * C, (b + 1) * S * C)
  })
  const backend = await testBackend(options)
  const inputs = [
    { data: q, shape: [B, T, H, C] },
    { data: stored, shape: [B, S, C], dtype },
    { data: lengths, shape: [B], dtype: 'i32' as const },
  ]
  const scale = C ** -0.5
  const [got] = await runOp(backend, 'latentAttention', inputs, { scale, valueDim, precision }, [
    { shape: [B, T, H, valueDim], dtype: 'f32' },
  ])
  backend.dispose()
  let expected = expectedByCase[dtype].get(c)
  if (!expected) {
    const sizes = { B, T, S, H, G: 1, Dk: C, Dv: C }
    const { out } = plainAttention(sizes, q, cache, cache, { causal: true, scale, lengths })
    expected = out.filter((_, i) => i % C < valueDim)
    expectedByCase[dtype].set(c, expected)
  }
  return { got, expected }
}

describe.each(await availableIsas())('latentAttention on %s', isa => {
  test.each(cases)('matches f64 loops: $B x $T x $H, $S keys of $C, values $valueDim', async c => {
    const f32 = await run(c, 'f32', { isa })
    expect(worstError(f32.got, f32.expected)).toBeLessThan(3e-6)
    const stored = await run(c, 'f32', { isa }, 'bf16')
    expect(worstError(stored.got, stored.expected)).toBeLessThan(3e-6)
    for (const dtype of ['f32', 'bf16'] as const) {
      const bf16 = await run(c, 'bf16', { isa }, dtype)
      expect(worstError(bf16.got, bf16.expected)).toBeLessThan(bf16Isas.has(isa) ? 2e-2 : 3e-6)
    }
  })

  test('results are bitwise equal with one and two threads', async () => {
    for (const c of cases) {
      for (const dtype of ['f32', 'bf16'] as const) {
        const { got } = await run(c, 'bf16', { isa, threads: 1 }, dtype)
        expect((await run(c, 'bf16', { isa, threads: 2 }, dtype)).got).toEqual(got)
      }
    }
  })
})

interface PagedCase {
  readonly B: number
  readonly T: number
  readonly H: number
  readonly C: number
  readonly valueDim: number
  readonly page: number
  readonly lengths: readonly number[]
}

const pagedCases: PagedCase[] = [
  { B: 1, T: 1, H: 4, C: 576, valueDim: 512, page: 16, lengths: [1111] },
  { B: 2, T: 3, H: 65, C: 96, valueDim: 80, page: 64, lengths: [130, 1000] },
  { B: 9, T: 1, H: 16, C: 160, valueDim: 128, page: 64, lengths: [300, 1, 0, 64, 65, 200, 128, 30, 300] },
  { B: 8, T: 2, H: 33, C: 48, valueDim: 32, page: 16, lengths: [100, 3, 0, 48, 96, 47, 49, 16] },
  { B: 3, T: 2, H: 5, C: 21, valueDim: 13, page: 5, lengths: [2, 0, 803] },
  { B: 2, T: 1, H: 20, C: 96, valueDim: 64, page: 16, lengths: [40, 900] },
  // As sparse attention reads its selected rows.
  { B: 5, T: 1, H: 20, C: 96, valueDim: 64, page: 1, lengths: [40, 300, 0, 1, 97] },
  { B: 1, T: 1, H: 128, C: 576, valueDim: 512, page: 1, lengths: [700] },
  { B: 2, T: 3, H: 3, C: 21, valueDim: 13, page: 1, lengths: [5, 130] },
]

/** Returns a cache of shuffled pages, the first of which all sequences share, and the same rows as a contiguous cache. Unused rows are NaN. */
function pagedRows({ B, C, page, lengths }: PagedCase, random: Random) {
  const perSequence = Math.ceil(Math.max(...lengths) / page) + 1
  const pageCount = B * perSequence + 3
  const free = Array.from({ length: pageCount }, (_, i) => (i * 7 + 2) % pageCount).filter(
    (n, i, all) => all.indexOf(n) === i,
  )
  const shared = free[0]
  const pages = Int32Array.from({ length: B * perSequence }, (_, i) => (i % perSequence === 0 ? shared : free[1 + i]))
  const cache = new Float32Array(pageCount * page * C).fill(Number.NaN)
  const contiguous = new Float32Array(B * perSequence * page * C).fill(Number.NaN)
  lengths.forEach((length, b) => {
    for (let s = 0; s < length; s++) {
      const at = (pages[b * perSequence + Math.floor(s / page)] * page + (s % page)) * C
      if (Number.isNaN(cache[at])) cache.set(random.normal(C), at)
      contiguous.set(cache.subarray(at, at + C), (b * perSequence * page + s) * C)
    }
  })
  return { pages, cache, contiguous, perSequence, pageCount }
}

describe.each(await availableIsas())('paged cache on %s', isa => {
  test.each(pagedCases)('$B x $T x $H, $C in pages of $page: bitwise equal to a contiguous cache', async c => {
    const { B, T, H, C, valueDim, page, lengths } = c
    const random = new Random(4)
    const { pages, cache, contiguous, perSequence, pageCount } = pagedRows(c, random)
    const q = { data: random.normal(B * T * H * C), shape: [B, T, H, C] }
    const used = { data: lengths, shape: [B], dtype: 'i32' as const }
    const table = { data: pages, shape: [B, perSequence], dtype: 'i32' as const }
    for (const dtype of ['f32', 'bf16'] as const) {
      for (const precision of ['f32', 'bf16'] as const) {
        const results: HostArray[] = []
        for (const threads of [1, 2]) {
          const backend = await testBackend({ isa, threads })
          const run = async (...inputs: Parameters<typeof runOp>[2]) => {
            const attrs = { scale: C ** -0.5, valueDim, precision }
            const [out] = await runOp(backend, 'latentAttention', inputs, attrs, [
              { shape: [B, T, H, valueDim], dtype: 'f32' },
            ])
            results.push(out)
          }
          await run(q, { data: cache, shape: [pageCount, page, C], dtype }, used, table)
          await run(q, { data: contiguous, shape: [B, perSequence * page, C], dtype }, used)
          backend.dispose()
        }
        expect(Array.from(results[0]).some(Number.isNaN)).toBe(false)
        for (const result of results) expect(result).toEqual(results[0])
      }
    }
  })
})

test('a captured graph uses the pages and lengths written before its replay', async () => {
  const backend = await testBackend()
  const random = new Random(5)
  const q = fromHost(random.normal(2 * 4 * 48), [2, 1, 4, 48], 'f32', backend)
  const cache = fromHost(random.normal(6 * 16 * 48), [6, 16, 48], 'f32', backend)
  const lengths = fromHost(Int32Array.of(20, 3), [2], 'i32', backend)
  const pages = fromHost(Int32Array.of(4, 2, 1, 1), [2, 2], 'i32', backend)
  const run = () => noGrad(() => latentAttention(q, cache, lengths, { scale: 0.2, valueDim: 32, pages }))
  const first = await run().values()
  const graph = backend.capture(run)
  backend.write(pages, Int32Array.of(0, 3, 5, 2))
  backend.write(lengths, Int32Array.of(32, 17))
  graph.replay()
  const replayed = await graph.result.values()
  expect(replayed).toEqual(await run().values())
  expect(replayed).not.toEqual(first)
  backend.dispose()
})
