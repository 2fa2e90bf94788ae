import { concat, MoeError, Random, randn, scope, setDefaultBackend, type Tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { type MlaConfig, MultiHeadLatentAttention, PagedCache, type PagedSequence } from '../index.ts'

setDefaultBackend(referenceBackend())

const config: MlaConfig = {
  hidden_size: 24,
  num_attention_heads: 3,
  q_lora_rank: null,
  kv_lora_rank: 8,
  qk_nope_head_dim: 6,
  qk_rope_head_dim: 4,
  v_head_dim: 5,
}

/** A source of random integers below n. */
const randomIntegers = (seed: number) => {
  const random = new Random(seed)
  return (n: number) => Math.floor(random.uniform(1)[0] * n)
}

test.each([1, 2, 3])(
  'sequences that start, share pages, grow and end give the same outputs as alone (seed %i)',
  async seed => {
    const below = randomIntegers(seed)
    const random = new Random(seed + 10)
    const mla = new MultiHeadLatentAttention(config, { random, std: 0.3 })
    // Few token values, so that sequences share prefixes by chance. A token determines its input.
    const vocabulary = Array.from({ length: 2 }, () => randn([1, 1, 24], random))
    const inputs = (tokens: readonly number[]): Tensor =>
      concat(
        tokens.map(token => vocabulary[token]),
        1,
      )
    const cache = new PagedCache(mla.cacheFeatures, { layers: 1, tokens: 60, pageSize: 4 })
    const open: { tokens: number[]; sequence: PagedSequence }[] = []
    let shared = 0
    let rejected = 0
    for (let round = 0; round < 60; round++) {
      if (open.length < 4 && below(2) === 0) {
        const tokens = Array.from({ length: 1 + below(12) }, () => below(2))
        const sequence = cache.start(tokens)
        shared += sequence.length
        expect(sequence.length).toBeLessThan(tokens.length)
        open.push({ tokens, sequence })
      }
      if (open.length > 0 && below(6) === 0) cache.release(open.splice(below(open.length), 1)[0].sequence)
      // Add as many tokens to each as the one with the fewest has left. Sequences without room leave.
      for (const each of open.slice()) {
        if (each.sequence.length === each.tokens.length) each.tokens.push(below(2))
        if (cache.reserve(each.sequence, each.tokens.length)) continue
        rejected++
        cache.release(each.sequence)
        open.splice(open.indexOf(each), 1)
      }
      if (open.length === 0) continue
      const time = Math.min(...open.map(({ tokens, sequence }) => tokens.length - sequence.length))
      const batch = cache.batch(open.map(({ sequence }) => sequence))
      const next = open.map(({ tokens, sequence }) => inputs(tokens.slice(sequence.length, sequence.length + time)))
      const got = await scope(() => mla.forward(concat(next, 0), { cache: batch })).values()
      batch.advance(time)
      for (const [i, { tokens, sequence }] of open.entries()) {
        const whole = await scope(() => mla.forward(inputs(tokens.slice(0, sequence.length)))).values()
        const expected = whole.subarray((sequence.length - time) * 24)
        const own = got.subarray(i * time * 24, (i + 1) * time * 24)
        assertClose(`round ${round}, sequence ${i}`, own, expected, { relative: 1e-5, absolute: 1e-6 })
        cache.share(sequence, tokens)
      }
    }
    expect(shared).toBeGreaterThan(0)
    expect(rejected).toBeGreaterThan(0)
    for (const { sequence } of open) cache.release(sequence)
    expect(cache.available).toBe(60)
    cache.dispose()
  },
)

test('shared pages are reused after the sequence that filled them is released, until their memory is needed', () => {
  const cache = new PagedCache(12, { layers: 1, tokens: 16, pageSize: 4 })
  const tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
  const sequence = cache.start(tokens)
  expect(cache.reserve(sequence, 9)).toBe(true)
  cache.batch([sequence]).advance(9)
  cache.share(sequence, tokens)
  const pages = sequence.pages.slice(0, 2)
  cache.release(sequence)
  const other = cache.start([...tokens, 10])
  expect(other.pages).toEqual(pages)
  // The last token is never reused: its output is needed.
  expect(cache.start(tokens.slice(0, 8)).pages).toEqual(pages.slice(0, 1))
  expect(cache.start([0, ...tokens]).pages).toEqual([])
  const large = cache.start([9])
  expect(cache.reserve(large, 12)).toBe(false)
  expect(large.pages).toEqual([])
  expect(cache.reserve(large, 8)).toBe(true)
  cache.dispose()
})

test.each([
  { budget: 96, pages: 32 },
  { budget: 90, pages: 24 },
  { budget: 60, pages: 20 },
  { budget: 50, pages: 16 },
])('memory for $budget pages of a layer gives a cache of $pages pages with two layers', ({ budget, pages }) => {
  const reference = referenceBackend()
  const before = reference.stats().bytes
  const cacheBytes = () => reference.stats().bytes - before
  let pageBytes = Number.POSITIVE_INFINITY
  const concat: typeof reference.primitives.concat = (parts, attrs, specs) => {
    const live = cacheBytes() / pageBytes
    if (live + specs[0].shape[0] > budget)
      throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'concat', problem: `${live} pages are in use` })
    return reference.primitives.concat(parts, attrs, specs)
  }
  const backend = { ...reference, primitives: { ...reference.primitives, concat } }
  const cache = new PagedCache(12, { layers: 2, tokens: 128, pageSize: 4, backend })
  pageBytes = cacheBytes() / 32
  const sequence = cache.start([])
  expect(cache.reserve(sequence, 17 * 4)).toBe(pages > 16)
  expect(cache.tokens).toBe(pages * 4)
  expect(cache.available).toBe((pages - sequence.pages.length) * 4)
  // Nothing is left of the attempts that failed.
  expect(cacheBytes()).toBe(2 * pages * pageBytes)
  expect(cache.reserve(sequence, pages * 4)).toBe(true)
  expect(cache.reserve(sequence, pages * 4 + 1)).toBe(false)
  cache.dispose()
})

/** Starts a sequence and advances it to the end of these tokens. */
function sequenceOf(cache: PagedCache, tokens: readonly number[]): PagedSequence {
  const sequence = cache.start(tokens)
  expect(cache.reserve(sequence, tokens.length)).toBe(true)
  cache.batch([sequence]).advance(tokens.length - sequence.length)
  return sequence
}

test('a page is identified by its tokens and all pages before it', () => {
  const cache = new PagedCache(12, { layers: 1, tokens: 64, pageSize: 2 })
  for (const tokens of [
    [1, 2, 7, 7, 3],
    [3, 4, 7, 7, 8, 8, 3],
    [5, 6, 3],
  ]) {
    cache.share(sequenceOf(cache, tokens), tokens)
  }
  expect(cache.start([5, 6, 7, 7, 3]).length).toBe(2)
  expect(cache.start([1, 2, 7, 7, 8, 8, 3]).length).toBe(4)
  expect(cache.start([3, 4, 7, 7, 8, 8, 3]).length).toBe(6)
  cache.dispose()
})

test('with lookahead, a page is also identified by the tokens after it', () => {
  const cache = new PagedCache(12, { layers: 1, tokens: 64, pageSize: 4, lookahead: 2 })
  const tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
  const sequence = sequenceOf(cache, tokens.slice(0, 9))
  // The tokens after the second page, which MTP modules also process, are not known yet.
  cache.share(sequence, tokens.slice(0, 9))
  expect(sequence.shared).toBe(1)
  cache.share(sequence, tokens)
  expect(sequence.shared).toBe(2)
  expect(cache.start(tokens).length).toBe(8)
  expect(cache.start([...tokens, 11]).length).toBe(8)
  expect(cache.start(tokens.slice(0, 9)).length).toBe(4)
  expect(cache.start([...tokens.slice(0, 9), 0]).length).toBe(4)
  expect(cache.start([...tokens.slice(0, 5), 0, 7, 8, 9, 10]).length).toBe(0)
  expect(() => new PagedCache(12, { layers: 1, tokens: 4, lookahead: -1 })).toThrow('lookahead = -1 is not a positive')
  cache.dispose()
})

test('pages from before clearPrefixes() are not shared', () => {
  const cache = new PagedCache(12, { layers: 1, tokens: 64, pageSize: 4 })
  const tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
  const before = sequenceOf(cache, tokens)
  cache.clearPrefixes()
  cache.share(before, tokens)
  expect(cache.start(tokens).pages).toEqual([])
  cache.release(before)
  cache.share(sequenceOf(cache, tokens), tokens)
  expect(cache.start(tokens).length).toBe(8)
  cache.dispose()
})

test('a batch without reserved pages, and invalid sizes, are rejected', () => {
  const cache = new PagedCache(12, { layers: 1, tokens: 16, pageSize: 4 })
  const sequence = cache.start([1])
  expect(() => cache.batch([sequence]).reserve(1)).toThrow('call PagedCache.reserve for it first')
  expect(() => new PagedCache(12, { layers: 1, tokens: 0 })).toThrow('tokens = 0 is not a positive integer')
  cache.dispose()
})
