import { setDefaultBackend, zeros } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { describe, expect, test } from 'vitest'
import { type MlaConfig, MultiHeadAttention, MultiHeadLatentAttention, RotaryEmbedding, yarnMscale } from './index.ts'

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

test('first(n) equals at() for the first n positions', async () => {
  const rotary = new RotaryEmbedding(config)
  const backend = referenceBackend()
  for (const time of [1, 5, 8]) {
    const { cos, sin } = rotary.first(time, backend)
    expect(cos.shape).toEqual([time, 2])
    const angles = rotary.angles(Int32Array.from({ length: time }, (_, i) => i))
    expect(await cos.values()).toEqual(angles.cos)
    expect(await sin.values()).toEqual(angles.sin)
  }
})

test("YaRN's temperature is 1 without an extension", () => {
  expect(yarnMscale(40, 0.707)).toBeCloseTo(1.2608037, 6)
  expect(yarnMscale(1.5, 1)).toBeCloseTo(1 + 0.1 * Math.log(1.5), 12)
  for (const factor of [1, 0.5]) expect(yarnMscale(factor, 1)).toBe(1)
})

test('the norms on the latents have an epsilon of 1e-6, like those of the released models', () => {
  const mla = new MultiHeadLatentAttention({ ...config, q_lora_rank: 8, rms_norm_eps: 1e-5 } as MlaConfig)
  expect([mla.q_a_layernorm?.eps, mla.kv_a_layernorm.eps]).toEqual([1e-6, 1e-6])
})

test('queries are scaled by the logarithm of the contexts before them', async () => {
  const rope_scaling = {
    type: 'yarn',
    factor: 4,
    original_max_position_embeddings: 4,
    llama_4_scaling_beta: 0.5,
  } as const
  const backend = referenceBackend()
  const rotary = new RotaryEmbedding({ ...config, rope_scaling })
  const { queryFactors } = rotary.first(9, backend)
  const [first, second, third] = [1, 1 + 0.5 * Math.log(2), 1 + 0.5 * Math.log(3)]
  const expected = Float32Array.of(first, first, first, first, second, second, second, second, third)
  expect(await queryFactors?.values()).toEqual(expected)
  expect(await rotary.at(Int32Array.of(3, 4, 8), [3, 1], backend).queryFactors?.values()).toEqual(
    Float32Array.of(first, second, third),
  )
  expect(new RotaryEmbedding(config).first(9, backend).queryFactors).toBeUndefined()
})

describe('settings that would give NaN are rejected', () => {
  const yarn = { type: 'yarn', factor: 4, original_max_position_embeddings: 16 } as const
  const cases: ReadonlyArray<[string, object, RegExp]> = [
    ['another type of scaling', { rope_scaling: { ...yarn, type: 'linear' } }, /type = "linear" is not "yarn"/],
    ['a factor of 0', { rope_scaling: { ...yarn, factor: 0 } }, /factor = 0 is not/],
    [
      'no original length',
      { rope_scaling: { type: 'yarn', factor: 4 } },
      /original_max_position_embeddings = undefined/,
    ],
    ['a base of 0', { rope_theta: 0 }, /rope_theta = 0 is not/],
    ['a ramp from 0', { rope_scaling: { ...yarn, beta_fast: 0 } }, /beta_fast = 0 is not a positive number/],
    ['a ramp to NaN', { rope_scaling: { ...yarn, beta_slow: Number.NaN } }, /beta_slow = NaN is not/],
    [
      'a negative scaling of queries',
      { rope_scaling: { ...yarn, llama_4_scaling_beta: -1 } },
      /llama_4_scaling_beta = -1 is neither 0 nor/,
    ],
  ]
  test.each(cases)('%s', (_, changed, message) => {
    const configError = expect.objectContaining({ code: 'E_CONFIG', message: expect.stringMatching(message) })
    expect(() => new MultiHeadLatentAttention({ ...config, ...changed } as MlaConfig)).toThrow(configError)
    expect(() => new MultiHeadAttention({ hidden_size: 8, num_attention_heads: 2, ...changed })).toThrow(configError)
    expect(() => new RotaryEmbedding({ ...config, ...changed } as MlaConfig)).toThrow(configError)
  })
})

test('multi-head attention does not scale queries by position', () => {
  const rope_scaling = {
    type: 'yarn',
    factor: 4,
    original_max_position_embeddings: 16,
    llama_4_scaling_beta: 1,
  } as const
  expect(() => new MultiHeadAttention({ hidden_size: 8, num_attention_heads: 2, rope_scaling })).toThrow(
    /llama_4_scaling_beta is set, but only latent attention/,
  )
})

test('inputs without a batch axis are rejected', () => {
  const layers = [
    new MultiHeadLatentAttention(config),
    new MultiHeadAttention({ hidden_size: 24, num_attention_heads: 3 }),
  ]
  for (const layer of layers)
    expect(() => layer.forward(zeros([2, 24]))).toThrow(/has shape \[2,24\], expected \[batch, time, 24\]/)
})

test('shared tables must have the number of features of the layer', () => {
  const rotary = new RotaryEmbedding({ qk_rope_head_dim: 2 })
  expect(() => new MultiHeadLatentAttention(config, { rotary })).toThrow(/rotate 2 features, the layer needs 4/)
})

test('the number of positions must equal the number of tokens', () => {
  const mla = new MultiHeadLatentAttention(config)
  expect(() => mla.forward(zeros([2, 3, 24]), { positions: Int32Array.of(0, 1, 2) })).toThrow(
    /3 positions for 2 x 3 tokens/,
  )
})
