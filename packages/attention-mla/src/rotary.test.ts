import { setDefaultBackend, zeros } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { describe, expect, test } from 'vitest'
import { type MlaConfig, MultiHeadAttention, MultiHeadLatentAttention, RotaryEmbedding } from './index.ts'

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
  ]
  test.each(cases)('%s', (_, changed, message) => {
    const configError = expect.objectContaining({ code: 'E_CONFIG', message: expect.stringMatching(message) })
    expect(() => new MultiHeadLatentAttention({ ...config, ...changed } as MlaConfig)).toThrow(configError)
    expect(() => new MultiHeadAttention({ hidden_size: 8, num_attention_heads: 2, ...changed })).toThrow(configError)
    expect(() => new RotaryEmbedding({ ...config, ...changed } as MlaConfig)).toThrow(configError)
  })
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
