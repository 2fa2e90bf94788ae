import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { readSafetensors } from '@moe/checkpoint'
import {
  addAdapters,
  decodeHost,
  dtypeBytes,
  encodeHost,
  fromHost,
  gradients,
  loadStateDict,
  namedAdapters,
  namedParameters,
  Random,
  randn,
  setDefaultBackend,
  type Tensor,
  type Value,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import {
  type CacheDType,
  LatentCache,
  type MlaConfig,
  MultiHeadLatentAttention,
  RotaryEmbedding,
  rotaryFrequencies,
  softmaxScale,
  yarnMscale,
} from './index.ts'
import { limits } from './mla.ts'

setDefaultBackend(referenceBackend())

const fixture = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
// PyTorch computes the rotation angles in f32, so at positions in the thousands they are off by up to 1e-4 rad.
const gradientTolerance = { relative: 1e-3, absolute: 1e-4 }

describe('published constants', () => {
  test('of softmax scales', () => {
    const v3: MlaConfig = {
      hidden_size: 7168,
      num_attention_heads: 128,
      q_lora_rank: 1536,
      kv_lora_rank: 512,
      qk_nope_head_dim: 128,
      qk_rope_head_dim: 64,
      v_head_dim: 128,
    }
    const yarn = { type: 'yarn', factor: 40, original_max_position_embeddings: 4096 } as const
    expect(yarnMscale(40, 1)).toBeCloseTo(1.3688879454, 9)
    expect(yarnMscale(40, 0.707)).toBeCloseTo(1.2608037774, 9)
    expect(softmaxScale(v3)).toBeCloseTo(0.0721687836, 9)
    expect(softmaxScale({ ...v3, rope_scaling: { ...yarn, mscale: 1, mscale_all_dim: 1 } })).toBeCloseTo(
      0.1352337789,
      9,
    )
    expect(softmaxScale({ ...v3, rope_scaling: { ...yarn, mscale: 0.707, mscale_all_dim: 0.707 } })).toBeCloseTo(
      0.1147213868,
      9,
    )
  })

  test('of the YaRN frequencies of V3', () => {
    const found = rotaryFrequencies(64, 10000, {
      type: 'yarn',
      factor: 40,
      original_max_position_embeddings: 4096,
      beta_fast: 32,
      beta_slow: 1,
    })
    const published = {
      0: 1,
      9: 0.0749894209,
      10: 0.0562341325,
      11: 0.0390069266,
      16: 0.0055,
      22: 1.778279e-4,
      23: 3.333804e-5,
      31: 3.333804e-6,
    }
    for (const [i, value] of Object.entries(published)) expect(found[Number(i)] / value).toBeCloseTo(1, 5)
  })

  test('of the elements per token and layer in the cache: kv_lora_rank + qk_rope_head_dim', () => {
    const cache = new LatentCache({ kv_lora_rank: 512, qk_rope_head_dim: 64 }, { layers: 61, capacity: 1 })
    expect(cache.bytesPerToken).toBe(61 * 576 * 4)
    cache.dispose()
  })

  test.each([
    ['V3', 61, 70_272],
    ['V2', 60, 69_120],
    ['V2-Lite and Moonlight', 27, 31_104],
  ])('of the bytes per token of %s in bf16', (_, layers, bytes) => {
    const sizes = { kv_lora_rank: 512, qk_rope_head_dim: 64 }
    const cache = new LatentCache(sizes, { layers, batch: 2, capacity: 3, dtype: 'bf16' })
    expect(cache.bytesPerToken).toBe(bytes)
    const bytesOfRows = () => {
      const rows = Array.from({ length: layers }, (_, layer) => cache.rows(layer))
      return rows.reduce((sum, { size, dtype }) => sum + size * dtypeBytes[dtype], 0)
    }
    expect([bytesOfRows(), cache.bytes]).toEqual([6 * bytes, 6 * bytes])
    for (let layer = 0; layer < layers; layer++) cache.write(layer, zeros([2, 4, 576]))
    expect([bytesOfRows(), cache.bytes]).toEqual([12 * bytes, 12 * bytes])
    cache.dispose()
  })
})

for (const name of ['q-lora', 'no-q-lora', 'yarn', 'yarn-mscale', 'scaled-queries', 'sparse', 'sparse-interleaved']) {
  describe(`transformers: ${name}`, () => {
    const { config, softmaxScale: scale } = JSON.parse(readFileSync(fixture(`${name}.json`), 'utf8'))

    test('the softmax scale is the same', () => expect(softmaxScale(config)).toBeCloseTo(scale, 6))

    test('the output and all gradients are the same', async () => {
      await using file = await readSafetensors(fixture(`${name}.safetensors`))
      const mla = new MultiHeadLatentAttention(config)
      await loadStateDict(mla, {
        keys: () =>
          file
            .keys()
            .filter(key => key.startsWith('weight.'))
            .map(key => key.slice(7)),
        info: key => file.info(`weight.${key}`) as never,
        read: async key => (await file.read(`weight.${key}`)).data as Float32Array,
      })
      const get = async (key: string) => {
        const { shape, data } = await file.read(key)
        return fromHost(data as Float32Array, shape, 'f32')
      }
      const positions = (await file.read('position_ids')).data as Int32Array
      const x = (await get('hidden_states')).mul(1)
      x.tracked = true
      const out = mla.forward(x, { positions })
      const output = await (await get('output')).values()
      // Rounding errors grow with the size of the summands, and with PyTorch's f32 angles at positions in the
      // thousands.
      const largest = Math.max(...Array.from(output, Math.abs))
      assertClose('output', await out.values(), output, { relative: 1e-4, absolute: 2e-6 * largest })
      // The indexer has no gradient without its own loss.
      const named = namedParameters(mla).filter(({ name: key }) => !key.startsWith('indexer.'))
      const found = gradients(out, [x, ...named.map(({ parameter }) => parameter)], {
        gradient: await get('grad_output'),
      })
      const keys = ['grad.hidden_states', ...named.map(({ name: key }) => `grad.weight.${key}`)]
      for (const [i, key] of keys.entries()) {
        assertClose(key, await (found[i] as Tensor).values(), await (await get(key)).values(), gradientTolerance)
      }
    })
  })
}

describe('decoding over the latent cache', () => {
  const base: MlaConfig = {
    hidden_size: 24,
    num_attention_heads: 3,
    q_lora_rank: 10,
    kv_lora_rank: 12,
    qk_nope_head_dim: 8,
    qk_rope_head_dim: 4,
    v_head_dim: 6,
  }
  const yarn = { type: 'yarn', factor: 8, original_max_position_embeddings: 16, mscale: 1, mscale_all_dim: 1 } as const
  const scaled = { ...yarn, original_max_position_embeddings: 3, llama_4_scaling_beta: 0.5 }
  const scalings = [['plain', null] as const, ['YaRN', yarn] as const, ['scaled queries', scaled] as const]
  for (const q_lora_rank of [10, null]) {
    for (const [rope, rope_scaling] of scalings) {
      for (const absorbUpTo of [0, 100]) {
        const label = `${q_lora_rank ? 'q_lora' : 'no q_lora'}, ${rope}, ${absorbUpTo ? 'absorbed' : 'expanded'}`
        test(`equals the full forward at every position: ${label}`, async () => {
          const config = { ...base, q_lora_rank, rope_scaling }
          const random = new Random(4)
          const mla = new MultiHeadLatentAttention(config, { random, std: 0.3 })
          const x = randn([2, 11, 24], random)
          const whole = await mla.forward(x).values()
          // A small capacity, so that the cache has to grow.
          const cache = new LatentCache(config, { layers: 1, batch: 2, capacity: 2 })
          let start = 0
          for (const time of [4, 1, 3, 1, 1, 1]) {
            const out = mla.forward(x.narrow(1, start, start + time), { cache, absorbUpTo })
            cache.advance(time)
            const got = await out.values()
            for (let b = 0; b < 2; b++) {
              const expected = whole.subarray((b * 11 + start) * 24, (b * 11 + start + time) * 24)
              assertClose(`row ${b} from ${start}`, got.subarray(b * time * 24, (b + 1) * time * 24), expected, {
                relative: 1e-5,
                absolute: 1e-6,
              })
            }
            start += time
          }
          // Truncated tokens have no influence.
          cache.truncate(5)
          const again = await mla.forward(x.narrow(1, 5, 7), { cache, absorbUpTo }).values()
          assertClose('after truncation', again.subarray(0, 48), whole.subarray(5 * 24, 7 * 24), {
            relative: 1e-5,
            absolute: 1e-6,
          })
          cache.dispose()
        })
      }
    }
  }

  test('a bf16 cache stores the rounded rows of an f32 cache, and gives the same outputs absorbed and expanded', async () => {
    const random = new Random(9)
    const mla = new MultiHeadLatentAttention(base, { random, std: 0.3 })
    const x = randn([2, 9, 24], random)
    const whole = await mla.forward(x).values()
    const decode = async (dtype: CacheDType, absorbUpTo: number) => {
      const cache = new LatentCache(base, { layers: 1, batch: 2, capacity: 2, dtype })
      const rows: number[] = []
      let start = 0
      for (const time of [3, 1, 4, 1]) {
        const out = mla.forward(x.narrow(1, start, start + time), { cache, absorbUpTo })
        cache.advance(time)
        start += time
        rows.push(...(await out.narrow(0, 1, 2).values()))
      }
      const stored = await cache.rows(0).narrow(1, 0, 9).values()
      cache.dispose()
      return { rows, stored }
    }
    const exact = await decode('f32', 100)
    const absorbed = await decode('bf16', 100)
    const expanded = await decode('bf16', 0)
    assertClose('rows', absorbed.stored, decodeHost('bf16', encodeHost('bf16', exact.stored)), tolerances.exact)
    assertClose('both forms', absorbed.rows, expanded.rows, { relative: 1e-5, absolute: 1e-6 })
    // The rows have 8 significant bits, which bounds the difference of the output.
    expect(absorbed.rows).not.toEqual(exact.rows)
    assertClose('output', absorbed.rows, whole.subarray(9 * 24), { relative: 2 ** -7, absolute: 2 ** -7 })
  })

  test.each([
    ['f32', undefined, false, 3],
    ['adapters', undefined, true, 3],
    ['bf16', 'bf16', false, 3],
    ['int8', 'int8', true, 3],
    // 128 rows, which have common scales, are two heads.
    ['fp8', 'fp8', false, 4],
  ] as const)('keys and values are expanded for some heads at a time: %s', async (_, weights, adapted, heads) => {
    const calls: number[] = []
    // Declines, after noting the number of heads.
    const attention = ([, keys]: readonly Value[]) => {
      calls.push(keys.shape[2])
      return undefined
    }
    const backend = { ...referenceBackend(), fused: { attention } }
    const sizes = { ...base, num_attention_heads: heads, ...(weights === 'fp8' && { v_head_dim: 56 }) }
    const random = new Random(7)
    const mla = new MultiHeadLatentAttention(sizes, { random, std: 0.3, backend, weights })
    if (adapted) {
      addAdapters(mla, { rank: 2 })
      for (const { adapter } of namedAdapters(mla))
        adapter.up.assign(randn(adapter.up.shape, random, { std: 0.3, backend }))
    }
    const x = randn([2, 40, 24], random, { backend })
    const run = async () => {
      const cache = new LatentCache(sizes, { layers: 1, batch: 2, capacity: 64, backend })
      const outs: Float32Array[] = []
      for (const [from, to] of [
        [0, 30],
        [30, 40],
      ]) {
        const out = mla.forward(x.narrow(1, from, to), { cache })
        outs.push((await out.values()) as Float32Array)
        cache.advance(to - from)
      }
      cache.dispose()
      return outs
    }
    const whole = await run()
    const before = limits.expanded
    try {
      // Two heads of the shorter length, one of the longer.
      limits.expanded = 2 * 2 * 30 * (2 * (8 + sizes.v_head_dim) + 4)
      expect(await run()).toEqual(whole)
    } finally {
      limits.expanded = before
    }
    const two = weights === 'fp8' ? [2, 2] : [1, 1, 1]
    expect(calls).toEqual([heads, heads, ...(weights === 'fp8' ? [2, 2] : [2, 1]), ...two])
  })

  test('a batch may contain sequences of different lengths', async () => {
    const random = new Random(5)
    const mla = new MultiHeadLatentAttention(base, { random, std: 0.3 })
    const a = randn([1, 6, 24], random)
    const b = randn([1, 3, 24], random)
    const alone = async (x: Tensor) => (await mla.forward(x).values()).slice(-24)
    const cache = new LatentCache(base, { layers: 1, batch: 2 })
    // Row b is padded with tokens that are truncated afterwards.
    const filled = fromHost(
      Float32Array.from([
        ...(await a.narrow(1, 0, 5).values()),
        ...(await b.narrow(1, 0, 2).values()),
        ...new Float32Array(72).fill(9),
      ]),
      [2, 5, 24],
      'f32',
    )
    mla.forward(filled, { cache })
    cache.advance(5)
    cache.truncate([5, 2])
    const last = fromHost(
      Float32Array.from([...(await a.narrow(1, 5, 6).values()), ...(await b.narrow(1, 2, 3).values())]),
      [2, 1, 24],
      'f32',
    )
    const out = await mla.forward(last, { cache }).values()
    assertClose('long row', out.slice(0, 24), await alone(a), { relative: 1e-5, absolute: 1e-6 })
    assertClose('short row', out.slice(24), await alone(b), { relative: 1e-5, absolute: 1e-6 })
    cache.dispose()
  })

  test('absorbed weights are recomputed after a change of kv_b_proj', async () => {
    const random = new Random(6)
    const mla = new MultiHeadLatentAttention(base, { random, std: 0.3, rotary: new RotaryEmbedding(base) })
    const x = randn([1, 2, 24], random)
    const run = async () => {
      const cache = new LatentCache(base, { layers: 1 })
      const out = await mla.forward(x, { cache, absorbUpTo: 8 }).values()
      cache.dispose()
      return out
    }
    await run()
    mla.kv_b_proj.weight.assign(mla.kv_b_proj.weight.detach().mul(2))
    assertClose('after the change', await run(), await mla.forward(x).values(), { relative: 1e-5, absolute: 1e-6 })
  })

  test('all invalid sizes are reported together', () => {
    expect(() => new MultiHeadLatentAttention({ ...base, hidden_size: 0, qk_rope_head_dim: 3 })).toThrow(
      /hidden_size = 0.*qk_rope_head_dim = 3 is odd/,
    )
  })
})
