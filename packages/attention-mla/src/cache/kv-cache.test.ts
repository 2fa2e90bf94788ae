import { backward, concat, noGrad, Random, randn, scope, setDefaultBackend, zeros } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import {
  cacheCost,
  KvCache,
  LatentCache,
  type MlaConfig,
  MultiHeadAttention,
  MultiHeadLatentAttention,
} from '../index.ts'

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

describe('the sequences of a cache', () => {
  test('may start, end and be replaced at any time, with the same outputs as alone', async () => {
    const random = new Random(1)
    const mla = new MultiHeadLatentAttention(config, { random, std: 0.3 })
    const texts = [randn([1, 9, 24], random), randn([1, 4, 24], random), randn([1, 6, 24], random)]
    const alone = await Promise.all(texts.map(x => mla.forward(x).values()))
    const cache = new LatentCache(config, { layers: 1, batch: 2, capacity: 2 })
    /** For each sequence of the batch, its text and the number of tokens processed. */
    const sequences = [
      { text: 0, done: 0 },
      { text: 1, done: 0 },
    ]
    const step = async (counts: readonly number[]) => {
      const time = Math.max(...counts)
      const rows = sequences.map(({ text, done }, i) => {
        const filling = zeros([1, time - counts[i], 24]).add(9)
        return concat([texts[text].narrow(1, done, done + counts[i]), filling], 1)
      })
      const out = await mla.forward(concat(rows, 0), { cache }).values()
      cache.advance(counts)
      sequences.forEach((sequence, i) => {
        const got = out.subarray(i * time * 24, (i * time + counts[i]) * 24)
        const expected = alone[sequence.text].subarray(sequence.done * 24, (sequence.done + counts[i]) * 24)
        assertClose(`text ${sequence.text}`, got, expected, { relative: 1e-5, absolute: 1e-6 })
        sequence.done += counts[i]
      })
    }
    await step([5, 3])
    await step([1, 1])
    await step([1, 0]) // the second one has ended
    cache.truncate([Infinity, 0])
    sequences[1] = { text: 2, done: 0 }
    await step([0, 5])
    await step([1, 1])
    expect([...cache.lengths]).toEqual([8, 6])
    cache.dispose()
  })

  test('cannot advance beyond the capacity, nor by anything but numbers', () => {
    const cache = new LatentCache(config, { layers: 1, batch: 2, capacity: 4 })
    cache.advance([1, 2])
    for (const time of [-1, 1.5, 3, [0, 3], [1], [1, 1, 1]]) {
      expect(() => cache.advance(time)).toThrow(expect.objectContaining({ code: 'E_ATTR' }))
    }
    expect(() => cache.advance(Number.NaN)).toThrow(/NaN is neither a number nor a list of 2 numbers/)
    expect(() => cache.truncate([1])).toThrow(/\[1\] is neither a number/)
    expect(() => cache.truncate(Number.NaN)).toThrow(/NaN is neither a number/)
    expect([...cache.lengths]).toEqual([1, 2])
    cache.dispose()
  })
})

test.each([
  ['latent', () => new MultiHeadLatentAttention(config, { random: new Random(1), std: 0.3 })],
  [
    'multi-head',
    () => new MultiHeadAttention({ hidden_size: 24, num_attention_heads: 3 }, { random: new Random(1), std: 0.3 }),
  ],
] as const)('%s attention rotates by the given positions, with a cache and without', async (_, make) => {
  const attention = make()
  const x = randn([1, 4, 24], new Random(2))
  const at = (...positions: number[]) => ({ positions: Int32Array.from(positions) })
  const whole = await attention.forward(x, at(2, 5, 6, 9)).values()
  const close = { relative: 1e-5, absolute: 1e-6 }
  // Only differences between positions matter, and they do.
  assertClose('shifted', await attention.forward(x, at(9, 12, 13, 16)).values(), whole, close)
  const plain = await attention.forward(x).values()
  expect(Math.max(...plain.map((value, i) => Math.abs(value - whole[i])))).toBeGreaterThan(1e-3)
  const cache = new KvCache(attention.cacheFeatures, { layers: 1 })
  const outs: number[] = []
  for (const [from, ...positions] of [
    [0, 2, 5],
    [2, 6],
    [3, 9],
  ]) {
    const some = x.narrow(1, from, from + positions.length)
    outs.push(...(await attention.forward(some, { cache, ...at(...positions) }).values()))
    cache.advance(positions.length)
  }
  assertClose('cached', outs, whole, close)
  cache.dispose()
})

test('options that have no effect with a cache are rejected', () => {
  const cache = new LatentCache(config, { layers: 1 })
  const mla = new MultiHeadLatentAttention(config)
  const mha = new MultiHeadAttention({ hidden_size: 24, num_attention_heads: 3 })
  const own = mha.makeCache({ layers: 1 })
  const x = zeros([1, 4, 24])
  const starts = zeros([1, 4], { dtype: 'i32' })
  for (const options of [{ starts }, { dense: true }, { onIndexerLoss: () => {} }])
    expect(() => mla.forward(x, { cache, ...options })).toThrow(
      `MultiHeadLatentAttention: with a cache, ${Object.keys(options)} would have no effect`,
    )
  expect(() => mha.forward(x, { cache: own, starts })).toThrow('MultiHeadAttention: with a cache, starts would')
  cache.dispose()
  own.dispose()
})

test('an input with another number of sequences than the cache is rejected', () => {
  const cache = new LatentCache(config, { layers: 1, batch: 2 })
  const mla = new MultiHeadLatentAttention(config)
  const x = zeros([3, 4, 24])
  expect(() => mla.forward(x, { cache })).toThrow(
    'MultiHeadLatentAttention: the input has 3 sequences, the cache 2; create the cache with batch: 3, or pass tokens for all its sequences',
  )
  const sizes = { hidden_size: 24, num_attention_heads: 3, num_key_value_heads: 3 }
  const mha = new MultiHeadAttention(sizes)
  const own = mha.makeCache({ layers: 1 })
  expect(() => mha.forward(x, { cache: own })).toThrow('MultiHeadAttention: the input has 3 sequences, the cache 1')
  cache.dispose()
  own.dispose()
})

test('invalid sizes and dtypes of a cache are rejected', () => {
  expect(() => new LatentCache(config, { layers: 1, capacity: 0 })).toThrow(/capacity = 0 is not a positive integer/)
  const dtype = 'fp8' as 'bf16'
  expect(() => new LatentCache(config, { layers: 1, dtype })).toThrow(
    /dtype = "fp8" is not supported; pass 'f32' or 'bf16'/,
  )
  expect(() => new LatentCache(config, { layers: 0 })).toThrow(expect.objectContaining({ code: 'E_CONFIG' }))
})

test('an unknown layer, and a disposed cache, are reported', () => {
  const cache = new LatentCache(config, { layers: 2 })
  expect(() => cache.rows(2)).toThrow(/layer 2 does not exist in a cache of 2 layers/)
  expect(() => cache.write(-1, zeros([1, 1, 12]))).toThrow(/layer -1 does not exist/)
  cache.dispose()
  expect(() => cache.rows(0)).toThrow(expect.objectContaining({ code: 'E_DISPOSED' }))
})

test('after a failed write, the next one succeeds', () => {
  const reference = referenceBackend()
  let full = false
  const cast: typeof reference.primitives.cast = (...of) => {
    if (full) throw new Error('no memory')
    return reference.primitives.cast(...of)
  }
  const backend = { ...reference, primitives: { ...reference.primitives, cast } }
  const cache = new LatentCache(config, { layers: 1, backend, dtype: 'bf16', capacity: 2 })
  const rows = zeros([1, 1, 12], { backend })
  full = true
  expect(() => cache.write(0, rows)).toThrow('no memory')
  full = false
  cache.write(0, rows)
  cache.dispose()
})

test('passes of many lengths keep rotation tables only for powers of two', () => {
  const backend = referenceBackend()
  const mla = new MultiHeadLatentAttention(config, { backend })
  const pass = (time: number) => noGrad(() => scope(() => void mla.forward(zeros([1, time, 24], { backend }))))
  pass(16)
  const before = backend.stats()
  for (let time = 9; time <= 16; time++) pass(time)
  expect(backend.stats()).toMatchObject({ handles: before.handles, bytes: before.bytes })
  // The table of 8 positions serves 5.
  scope(() => backward(mla.forward(zeros([1, 5, 24], { backend })).mean()))
})

test('a missing or misspelt configuration is rejected', () => {
  expect(() => new LatentCache(config, { layer: 1 } as never)).toThrow(
    'LatentCache: unknown option layer; did you mean layers?',
  )
  for (const make of [
    (config: never) => new LatentCache(config, { layers: 1 }),
    (config: never) => cacheCost(config, 1),
  ]) {
    expect(() => make(undefined as never)).toThrow('expected an options object, got undefined')
    expect(() => make({ kv_lora_rnak: 8, qk_rope_head_dim: 4 } as never)).toThrow('did you mean kv_lora_rank?')
  }
})
