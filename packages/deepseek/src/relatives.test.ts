/** @file Models of this architecture with other types, and unsupported types. transformers.test.ts compares their outputs. */
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readSafetensors, saveAdapters, type TensorEntry, writeSafetensors } from '@moe/checkpoint'
import {
  addAdapters,
  fromHost,
  namedAdapters,
  namedParameters,
  Random,
  randn,
  scope,
  setDefaultBackend,
  stateDict,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import { exportGguf } from './gguf/export-gguf.ts'
import {
  countParameters,
  DeepSeek,
  hfConfig,
  type LatentConfigInput,
  loadWeights,
  parseConfig,
  presets,
} from './index.ts'

const backend = referenceBackend()
setDefaultBackend(backend)
const root = await mkdtemp(join(tmpdir(), 'moe-relatives-'))
afterAll(() => rm(root, { recursive: true }))
afterEach(() => expect(backend.stats().handles).toBe(0))

const fixture = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
const json = async (folder: string) => JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'))

/** A copy of a fixture with another config.json. */
async function changed(name: string, change: (config: Record<string, unknown>) => object): Promise<string> {
  const folder = await mkdtemp(join(root, `${name}-`))
  await cp(fixture(name), folder, { recursive: true })
  await writeFile(join(folder, 'config.json'), JSON.stringify(change(await json(folder))))
  return folder
}

const weightsOf = async (model: DeepSeek) =>
  Object.fromEntries(await Promise.all(stateDict(model).map(async ({ name, data }) => [name, await data()])))

const tinyGlm: LatentConfigInput = {
  ...presets['glm-4.7-flash'],
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  moe_intermediate_size: 8,
  num_hidden_layers: 3,
  num_attention_heads: 2,
  n_routed_experts: 8,
  q_lora_rank: 12,
  kv_lora_rank: 8,
  qk_nope_head_dim: 12,
  qk_rope_head_dim: 4,
  v_head_dim: 16,
  eos_token_id: [1, 2, 3],
}

const tinyYoutu: LatentConfigInput = {
  ...presets['youtu-llm-2b'],
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  q_lora_rank: 12,
  kv_lora_rank: 8,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  bos_token_id: 0,
  eos_token_id: 1,
}

test('countParameters equals the counts of transformers, and those of created models', async () => {
  const { parameters } = JSON.parse(await readFile(fixture('relatives-sizes.json'), 'utf8'))
  const counts = (name: 'glm-4.7-flash' | 'youtu-llm-2b' | 'deepseek-v3.2' | 'mistral-small-4') =>
    countParameters(parseConfig(presets[name]))
  expect(counts('glm-4.7-flash').total).toBe(parameters['glm-4.7-flash'])
  expect(counts('deepseek-v3.2').total).toBe(parameters['deepseek-v3.2'])
  expect(counts('mistral-small-4').total).toBe(parameters['mistral-small-4'])
  expect(counts('youtu-llm-2b')).toMatchObject({ total: parameters['youtu-llm-2b'], moe: 0, mtp: 0 })
  // Published as 3 billion active parameters.
  expect(counts('glm-4.7-flash').activeWithoutEmbedding / 1e9).toBeCloseTo(3.4, 0)
  const tinySparse = { index_topk: 8, index_n_heads: 3, index_head_dim: 10 }
  for (const config of [tinyGlm, tinyYoutu, { ...tinyGlm, ...tinySparse, model_type: 'glm_moe_dsa' as const }]) {
    const model = new DeepSeek(config)
    const { total, mtp } = countParameters(model.config)
    expect(namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0)).toBe(total + mtp)
    model.dispose()
  }
})

test('a parsed configuration, and its Hugging Face form, parse to the same', () => {
  const odd = { ...presets['deepseek-llm-67b'], head_dim: 96 }
  for (const preset of [...Object.values(presets), odd, tinyGlm, tinyYoutu]) {
    const config = parseConfig(preset)
    expect(parseConfig(config)).toEqual(config)
    expect(parseConfig(hfConfig(config))).toEqual(config)
  }
})

describe('GLM', () => {
  test('has the configuration of V3, with the defaults of its class in transformers', () => {
    const { model_type, ...rest } = parseConfig(tinyGlm)
    expect(model_type).toBe('glm4_moe_lite')
    expect(rest).toMatchObject({ topk_method: 'noaux_tc', scoring_func: 'sigmoid', norm_topk_prob: true })
    const { model_type: v3, ...same } = parseConfig({ ...tinyGlm, model_type: 'deepseek_v3' })
    expect([v3, same]).toEqual(['deepseek_v3', rest])
    const { routed_scaling_factor, rms_norm_eps, n_shared_experts, first_k_dense_replace, ...bare } = tinyGlm
    expect(parseConfig({ ...bare, n_shared_experts: null })).toEqual(parseConfig(tinyGlm))
    expect(parseConfig(parseConfig(tinyGlm))).toEqual(parseConfig(tinyGlm))
  })

  test.each([
    [['dense', 'sparse', 'sparse'], undefined, 1],
    [['dense', 'dense', 'sparse'], undefined, 2],
    [['dense', 'dense', 'dense'], undefined, 3],
    [['sparse', 'sparse', 'sparse'], 0, 0],
    [null, undefined, 1],
    [null, 2, 2],
  ])(
    'layers %j with first_k_dense_replace %j give %i dense layers',
    (mlp_layer_types, first_k_dense_replace, dense) => {
      const config = parseConfig({ ...tinyGlm, mlp_layer_types, first_k_dense_replace })
      expect(config.first_k_dense_replace).toBe(dense)
      const kinds = Array.from({ length: 3 }, (_, layer) => (layer < dense ? 'dense' : 'sparse'))
      expect(hfConfig(config)).toMatchObject({ mlp_layer_types: kinds, first_k_dense_replace: dense })
    },
  )

  test.each([
    [['dense', 'sparse', 'dense'], undefined],
    [['dense', 'sparse'], undefined],
    [['dense', 'dense', 'sparse'], 1],
    [['dense', 'full', 'sparse'], undefined],
  ])('layers %j with first_k_dense_replace %j are rejected', (mlp_layer_types, first_k_dense_replace) => {
    expect(() => parseConfig({ ...tinyGlm, mlp_layer_types, first_k_dense_replace })).toThrow(
      /mlp_layer_types must have 3 entries: "dense" \d times, then "sparse"/,
    )
  })

  test('settings of the gate that transformers would ignore are rejected', () => {
    expect(() => parseConfig({ ...tinyGlm, topk_method: 'greedy', scoring_func: 'softmax' })).toThrow(
      /2 problems[\s\S]*topk_method = "greedy", but glm4_moe_lite always has "noaux_tc"[\s\S]*scoring_func = "softmax"/,
    )
  })
})

describe('Youtu', () => {
  test('has latent attention, no experts, and its own initializer ranges', async () => {
    const wide = { ...tinyYoutu, hidden_size: 96, vocab_size: 400 }
    const config = parseConfig(wide)
    expect(config).toMatchObject({ n_routed_experts: null, tie_word_embeddings: true })
    expect(config.initializer_range).toBeCloseTo(2 / Math.sqrt(5 * 96), 12)
    expect(config.embedding_initializer_range).toBeCloseTo(4 / Math.sqrt(5 * 96), 12)
    const model = new DeepSeek(wide, { seed: 3 })
    const deviation = async (name: string) => {
      const { parameter } = namedParameters(model).find(one => one.name === name) as never as {
        parameter: { values(): Promise<Float32Array> }
      }
      const values = await parameter.values()
      return Math.sqrt(values.reduce((sum, x) => sum + x * x, 0) / values.length)
    }
    const relative = async (name: string, expected: number) => (await deviation(name)) / expected
    expect(await relative('model.embed_tokens.weight', 4 / Math.sqrt(5 * 96))).toBeCloseTo(1, 1)
    expect(await relative('model.layers.1.mlp.up_proj.weight', 2 / Math.sqrt(5 * 96))).toBeCloseTo(1, 1)
    model.dispose()
    const empty = new DeepSeek(wide, { seed: null })
    expect((await empty.model.embed_tokens.weight.values()).every(x => x === 0)).toBe(true)
    empty.dispose()
  })

  test('experts and MTP modules are rejected', () => {
    const { moe_intermediate_size, num_experts_per_tok } = tinyGlm
    const experts = { n_routed_experts: 8, num_experts_per_tok, moe_intermediate_size }
    expect(() => parseConfig({ ...tinyYoutu, ...experts, num_nextn_predict_layers: 1 })).toThrow(
      /2 problems[\s\S]*n_routed_experts = 8, but youtu always has null[\s\S]*num_nextn_predict_layers = 1, but youtu always has 0/,
    )
  })

  test('a missing expert size is rejected in V3', () => {
    expect(() => parseConfig({ ...presets.tiny, moe_intermediate_size: undefined })).toThrow(
      /moe_intermediate_size is missing/,
    )
  })
})

describe('a saved model opens with the same type', () => {
  test.each([
    ['glm-mtp', 'glm4_moe_lite', 'Glm4MoeLiteForCausalLM'],
    ['glm-two-dense', 'glm4_moe_lite', 'Glm4MoeLiteForCausalLM'],
    ['youtu-tied', 'youtu', 'YoutuForCausalLM'],
    ['youtu-padding', 'youtu', 'YoutuForCausalLM'],
    ['kimi-k25', 'deepseek_v3', 'DeepseekV3ForCausalLM'],
    ['v32-mtp', 'deepseek_v32', 'DeepseekV32ForCausalLM'],
    ['dsa-glm', 'glm_moe_dsa', 'GlmMoeDsaForCausalLM'],
    ['mistral-base', 'mistral4', 'Mistral4ForCausalLM'],
    ['mistral-padding', 'mistral4', 'Mistral4ForCausalLM'],
  ])('%s: as %s', async (name, model_type, architecture) => {
    const model = await DeepSeek.fromPretrained(fixture(name))
    const folder = join(root, name)
    await model.save(folder)
    const saved = await json(folder)
    expect(saved).toMatchObject({ model_type, architectures: [architecture] })
    const original = await json(fixture(name))
    const config = (name === 'kimi-k25' ? original.text_config : original) as Record<string, unknown>
    // All fields that transformers wrote are the same, except the type.
    for (const [key, value] of Object.entries(config))
      if (key in saved && key !== 'model_type') expect([key, saved[key]]).toEqual([key, value])
    expect(
      Object.keys(config)
        .filter(key => !(key in saved))
        .sort(),
    ).toEqual(
      expect.not.arrayContaining(['mlp_layer_types', 'embedding_initializer_range', 'n_routed_experts', 'q_lora_rank']),
    )
    if (model_type === 'youtu')
      expect(Object.keys(saved).filter(key => /expert|topk|moe|nextn|scoring/.test(key))).toEqual([])
    const again = await DeepSeek.fromPretrained(folder)
    expect(again.config).toEqual(model.config)
    expect(await weightsOf(again)).toEqual(await weightsOf(model))
    again.dispose()
    model.dispose()
  })
})

test.each(['glm-mtp', 'youtu-tied', 'kimi-k25'])('adapters of %s open with their base model', async name => {
  const model = await DeepSeek.fromPretrained(fixture(name))
  addAdapters(model, { rank: 2, targets: ['q_b_proj', 'kv_b_proj', 'up_proj'] })
  const random = new Random(5)
  scope(() => {
    for (const { adapter } of namedAdapters(model)) adapter.up.assign(randn(adapter.up.shape, random, { std: 0.3 }))
  })
  const folder = join(root, `${name}-adapters`)
  await saveAdapters(folder, model, { base: fixture(name) })
  const again = await DeepSeek.fromPretrained(folder)
  const logits = async (of: DeepSeek) => {
    using out = of.infer(() => of.forward(fromHost(Int32Array.of(5, 9, 2, 7), [1, 4], 'i32')))
    return await out.values()
  }
  const plain = await DeepSeek.fromPretrained(fixture(name))
  // Random adapters have f64 values on this backend, those of the file f32 values.
  assertClose('logits', await logits(again), await logits(model), { relative: 1e-5, absolute: 1e-6 })
  expect(Array.from(await logits(again))).not.toEqual(Array.from(await logits(plain)))
  for (const opened of [plain, again, model]) opened.dispose()
})

describe('a multimodal model', () => {
  const nested = (change: (text: Record<string, unknown>) => object, outer: object = {}) =>
    changed('kimi-k25', config => ({
      ...config,
      ...outer,
      text_config: change(config.text_config as Record<string, unknown>),
    }))

  test('opens as its text model, with both forms of keys, and ignores other tensors', async () => {
    const plain = await DeepSeek.fromPretrained(fixture('v3-base'))
    const expected = await weightsOf(plain)
    const other = await changed('kimi-k25', config => ({ ...config, model_type: 'kimi_vl' }))
    await using file = await readSafetensors(join(fixture('kimi-k25'), 'model.safetensors'))
    expect(file.keys().filter(key => !key.startsWith('language_model.')).length).toBeGreaterThan(10)
    const entries = file.keys().map((key): TensorEntry => {
      const { dtype, shape } = file.info(key)
      const name = key.replace('language_model.model.', 'model.language_model.').replace('language_model.lm_', 'lm_')
      return { name, dtype: dtype as 'f32', shape, data: async () => (await file.read(key)).data as Float32Array }
    })
    await writeSafetensors(join(other, 'model.safetensors'), entries)
    for (const folder of [fixture('kimi-k25'), other]) {
      const model = await DeepSeek.fromPretrained(folder)
      expect(model.config).toEqual(plain.config)
      expect(await weightsOf(model)).toEqual(expected)
      model.dispose()
      const filled = new DeepSeek(plain.config, { seed: 9 })
      await loadWeights(filled, folder)
      expect(await weightsOf(filled)).toEqual(expected)
      filled.dispose()
      const path = join(folder === other ? folder : root, 'text.gguf')
      await exportGguf(folder, path, { type: 'f32', tokenizer: 'none', name: 'text' })
      const direct = join(root, 'direct.gguf')
      await exportGguf(fixture('v3-base'), direct, { type: 'f32', tokenizer: 'none', name: 'text' })
      expect(Buffer.compare(await readFile(path), await readFile(direct))).toBe(0)
    }
    plain.dispose()
  })

  test('takes tie_word_embeddings from the outer configuration', async () => {
    const { config } = { config: await json(fixture('kimi-k25')) }
    expect(parseConfig({ ...config, tie_word_embeddings: true }).tie_word_embeddings).toBe(true)
    expect(parseConfig({ ...config, tie_word_embeddings: undefined }).tie_word_embeddings).toBe(false)
  })

  test('is rejected with unsupported quantization, without a text model, and with an unsupported text model', async () => {
    const quantization_config = { quant_method: 'compressed-tensors', format: 'pack-quantized' }
    const packed = await nested(text => ({ ...text, quantization_config }))
    await expect(DeepSeek.fromPretrained(packed)).rejects.toMatchObject({
      code: 'E_UNSUPPORTED',
      message: expect.stringMatching(/config\.json: unsupported quantization: quant_method "compressed-tensors"/),
    })
    await expect(
      DeepSeek.fromPretrained(await changed('kimi-k25', ({ text_config, ...rest }) => rest)),
    ).rejects.toThrow('model_type "kimi_k25" is not supported: its text_config is missing')
    await expect(DeepSeek.fromPretrained(await nested(text => ({ ...text, model_type: 'qwen3_moe' })))).rejects.toThrow(
      'model_type "qwen3_moe" is not supported',
    )
    const deeper = await nested(text => ({ ...text, num_hidden_layers: 3 }))
    await expect(DeepSeek.fromPretrained(deeper)).rejects.toThrow(/missing.*\n.*model\.layers\.2\./)
  })
})

describe('other architectures', () => {
  test.each([
    ['deepseek_v4', 'its attention is sparse in another way'],
    ['axk1', 'it has a norm after the experts'],
    ['glm4_moe', 'its attention has no latents'],
    ['qwen3_moe', 'it is not of this architecture'],
    ['toString', 'it is not of this architecture'],
    [7, 'it is not of this architecture'],
  ])('%s is rejected: %s', async (model_type, why) => {
    const message = `DeepSeek: model_type ${JSON.stringify(model_type)} is not supported: ${why}; supported are deepseek_v3, deepseek_v32, deepseek_v2, glm4_moe_lite, glm_moe_dsa, youtu, mistral4, llama, kimi_k2, and the text models of kimi_k25, kimi_vl, mistral3`
    // Reported before unknown fields, because other families have other names for the same fields.
    expect(() => parseConfig({ ...presets.tiny, model_type, num_experts: 8 })).toThrow(message)
    const folder = await changed('v3-base', config => ({ ...config, model_type, num_experts: 8 }))
    await expect(DeepSeek.fromPretrained(folder)).rejects.toMatchObject({ code: 'E_CONFIG', message })
  })
})

describe('unsupported RoPE settings', () => {
  const yarn = { type: 'yarn', factor: 4, original_max_position_embeddings: 64 }
  test.each<[string, object, RegExp]>([
    ['partial rotation', { partial_rotary_factor: 0.5 }, /partial_rotary_factor: .*expected 1/],
    [
      'in rope_parameters',
      { rope_parameters: { partial_rotary_factor: 0.5 } },
      /rope_parameters\.partial_rotary_factor/,
    ],
    [
      'another amplitude',
      { rope_scaling: { ...yarn, attention_factor: 1 } },
      /attention_factor = 1, but .* give 1\.138/,
    ],
    ['a ramp without truncation', { rope_scaling: { ...yarn, truncate: false } }, /rope_scaling\.truncate/],
    [
      'queries scaled by position',
      { rope_scaling: { ...yarn, llama_4_scaling_beta: 0.1 } },
      /llama_4_scaling_beta: .*expected 0/,
    ],
    ['two types', { rope_scaling: { ...yarn, rope_type: 'default' } }, /type = "yarn", but .*rope_type = "default"/],
    ['an unknown type', { rope_scaling: { rope_type: 'longrope', factor: 4 } }, /rope type "longrope"/],
    [
      'two bases',
      { rope_theta: 5e3, rope_parameters: { rope_theta: 1e4 } },
      /rope_theta has conflicting values: 5000 and 10000/,
    ],
    [
      'by kinds of layers',
      { rope_parameters: { full_attention: { rope_theta: 1e6 } } },
      /rope_parameters\.full_attention/,
    ],
  ])('%s is rejected, also in a file', async (_, change, message) => {
    const { rope_theta, rope_scaling, ...rest } = presets['deepseek-v3']
    expect(() => parseConfig({ ...rest, ...change })).toThrow(message)
    const folder = await changed('v3-base', ({ rope_parameters, ...config }) => ({ ...config, ...change }))
    await expect(DeepSeek.fromPretrained(folder)).rejects.toThrow(message)
  })

  test.each(['deepseek_v2', 'deepseek_v32', 'glm_moe_dsa'] as const)(
    'rotation of halves is rejected for %s, whose readers ignore rope_interleave',
    model_type => {
      const { topk_method, scoring_func, norm_topk_prob, num_nextn_predict_layers, ...rest } = presets.tiny
      const config = { ...rest, model_type, index_head_dim: 32 }
      expect(parseConfig(config).rope_interleave).toBe(true)
      expect(() => parseConfig({ ...config, rope_interleave: false })).toThrow(
        `rope_interleave = false, but ${model_type} always has true`,
      )
    },
  )

  test('normalized gates of deepseek_v2 are rejected where its readers disagree about them', () => {
    const config = { ...presets.tiny, model_type: 'deepseek_v2', num_nextn_predict_layers: 0 } as const
    const v2 = { ...config, topk_method: 'greedy', scoring_func: 'softmax' } as const
    expect(() => parseConfig(v2)).toThrow('norm_topk_prob = true with topk_method = greedy')
    expect(parseConfig({ ...v2, norm_topk_prob: false }).norm_topk_prob).toBe(false)
    expect(parseConfig(config)).toMatchObject({ topk_method: 'noaux_tc', norm_topk_prob: true })
  })

  test('rope_scaling may contain the base', () => {
    const { rope_theta, ...rest } = presets['deepseek-v3']
    const scaled = { ...rest, rope_scaling: { ...yarn, rope_theta: 5e5, attention_factor: 0.1 * Math.log(4) + 1 } }
    expect(parseConfig(scaled)).toMatchObject({ rope_theta: 5e5, rope_scaling: yarn })
  })
})
