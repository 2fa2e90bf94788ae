import { cacheCost } from '@moe/attention-mla'
import { namedParameters, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { expect, test } from 'vitest'
import { countParameters, DeepSeek, parseConfig, presets } from './index.ts'
import { tiny } from './test-tiny.ts'

setDefaultBackend(referenceBackend())

test('countParameters returns the published counts', () => {
  const count = (name: keyof typeof presets) => countParameters(parseConfig(presets[name]))
  expect(count('deepseek-v3')).toMatchObject({
    attention: 187107328,
    moe: 11320164608,
    dense: 396361728,
    total: 671026419200,
    active: 37552297472,
    activeWithoutEmbedding: 36625618432,
  })
  expect(count('deepseek-v2')).toMatchObject({
    attention: 149227520,
    moe: 3822878720,
    dense: 188743680,
    total: 235741434880,
    active: 21375800320,
    activeWithoutEmbedding: 20851512320,
  })
  expect(count('deepseek-v2-lite')).toMatchObject({
    attention: 13763072,
    moe: 571080704,
    dense: 67239936,
    total: 15706484224,
    active: 2661150208,
    activeWithoutEmbedding: 2451435008,
  })
  expect(count('moonlight-16b-a3b')).toMatchObject({
    attention: 13763072,
    moe: 571080768,
    dense: 69206016,
    total: 15960110208,
    active: 2914776192,
    activeWithoutEmbedding: 2579231872,
  })
  expect(count('deepseek-v3').mtp / 1e9).toBeCloseTo(11.61, 1)
})

test('cacheCost returns the published bytes per token, and those of the cache of a model', () => {
  const cost = (name: keyof typeof presets, dtype: 'bf16' | 'f32' = 'bf16') => {
    const config = parseConfig(presets[name])
    return cacheCost(config, config.num_hidden_layers, dtype)
  }
  expect(cost('deepseek-v3')).toEqual({ elements: 35136, bytes: 70272, expandedBytes: 4997120 })
  expect(cost('deepseek-v2').bytes).toBe(69120)
  expect(cost('deepseek-v2-lite').bytes).toBe(31104)
  expect(cost('moonlight-16b-a3b').bytes).toBe(31104)
  const model = new DeepSeek(tiny)
  const cache = model.makeCache({ capacity: 16 })
  expect(cache.bytesPerToken).toBe(cacheCost(model.config, 2).bytes)
  expect(cache.bytes).toBe(16 * 2 * (8 + 4) * 4)
  cache.dispose()
  const half = model.makeCache({ capacity: 16, dtype: 'bf16' })
  expect(half.bytesPerToken).toBe(cacheCost(model.config, 2, 'bf16').bytes)
  expect(half.bytes).toBe(16 * 2 * (8 + 4) * 2)
  half.dispose()
  model.dispose()
})

test('countParameters equals the number of parameters of created models', () => {
  const leading = { ...tiny, first_k_dense_replace: 3, num_nextn_predict_layers: 2 } // The first module has no experts.
  const lite = { ...tiny, q_lora_rank: null, num_nextn_predict_layers: 0, tie_word_embeddings: true }
  for (const config of [tiny, lite, leading]) {
    const model = new DeepSeek(config)
    const { total, mtp } = countParameters(model.config)
    expect(namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0)).toBe(total + mtp)
    model.dispose()
  }
})
