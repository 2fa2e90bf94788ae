import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { afterEach, describe, expect, test } from 'vitest'
import {
  countParameters,
  DeepSeek,
  type DeepSeekConfigInput,
  type LatentConfigInput,
  parseConfig,
  presets,
} from './index.ts'

const backend = referenceBackend()
setDefaultBackend(backend)
afterEach(() => expect(backend.stats().handles).toBe(0))

const tiny = { ...presets.tiny, vocab_size: 16, num_hidden_layers: 1, num_nextn_predict_layers: 0 }
const make =
  (changes: object, options: object = {}) =>
  () =>
    new DeepSeek({ ...tiny, ...changes } as DeepSeekConfigInput, options).dispose()

/** Other fields in the config.json of V3, V3.2, V2, Moonlight, Kimi K2 and DeepSeek LLM, and those that transformers 5.18 writes. */
const otherFields =
  `architectures attention_dropout auto_map ep_size num_key_value_heads pretraining_tp quantization_config torch_dtype
  transformers_version use_cache aux_loss_alpha seq_aux pad_token_id head_dim qk_head_dim mlp_bias
  _name_or_path chunk_size_feed_forward dtype id2label is_encoder_decoder label2id output_attentions output_hidden_states problem_type
  return_dict use_return_dict num_local_experts sliding_window layer_types unk_token_id`.split(/\s+/)

describe('field names of a configuration', () => {
  test('of other programs are ignored', () => {
    expect(otherFields.length).toBeGreaterThan(30)
    make(Object.fromEntries(otherFields.map(name => [name, 1])))()
    const { num_hidden_layers, ...rest } = parseConfig(presets['deepseek-v3'])
    expect(
      parseConfig({ ...rest, num_hidden_layers, rope_scaling: { ...rest.rope_scaling, attention_factor: 1 } }),
    ).toEqual({
      ...rest,
      num_hidden_layers,
    })
  })

  test.each([
    ['num_hidden_layer', 'num_hidden_layers'],
    ['hiddenSize', 'hidden_size'],
    ['n_shared_expert', 'n_shared_experts'],
    ['topk_gruop', 'topk_group'],
    ['num_layers', 'num_hidden_layers'],
    ['n_embd', 'hidden_size'],
    ['num_heads', 'num_attention_heads'],
    ['num_experts', 'n_routed_experts'],
    ['top_k', 'num_experts_per_tok'],
    ['n_dense_layers', 'first_k_dense_replace'],
  ])('that are unknown are errors: %s, with the suggestion %s', (name, known) => {
    expect(make({ [name]: 2 })).toThrow(`DeepSeek: unknown option ${name}; did you mean ${known}?`)
  })

  test('in rope_scaling that are unknown are errors', () => {
    expect(make({ rope_scaling: { type: 'yarn', factor: 4, beta_fats: 8 } })).toThrow('did you mean beta_fast?')
  })

  test('in a file are ignored if they are unknown', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'moe-names-'))
    const model = new DeepSeek(tiny)
    await model.save(folder)
    model.dispose()
    const path = join(folder, 'config.json')
    const json = JSON.parse(await readFile(path, 'utf8'))
    await writeFile(
      path,
      JSON.stringify({
        ...json,
        n_groups: 7,
        num_layers: 9,
        top_k: 50,
        hidden_sizes: [1],
        rope_parameters: { rope_type: 'default', factors: 1 },
      }),
    )
    const read = await DeepSeek.fromPretrained(folder)
    expect(read.config.rope_theta).toBe(json.rope_theta)
    read.dispose()
    await rm(folder, { recursive: true })
  })
})

test('unknown options are rejected', async () => {
  expect(make({}, { sed: 1 })).toThrow('DeepSeek: unknown option sed; did you mean seed?')
  expect(make({}, { objective: { biasspeed: 0 } })).toThrow(
    'DeepSeek objective: unknown option biasspeed; did you mean biasSpeed?',
  )
  expect(make({}, { dropping: { devices: 1, undroped: 0 } })).toThrow('did you mean undropped?')
  for (const undropped of [-0.1, 10, Number.NaN, '0.1'])
    expect(make({}, { dropping: { devices: 1, undropped } })).toThrow(/undropped = .* is not a share from 0 to 1/)
  expect(make({}, null as never)).toThrow('DeepSeek: expected an options object, got null')
  expect(() => new DeepSeek(undefined as never)).toThrow(
    'DeepSeek: the configuration is undefined, not an object; pass the content of a config.json, or one of the presets',
  )
  await expect(DeepSeek.fromPretrained('nowhere', { seed: 1 } as never)).rejects.toThrow('unknown option seed')
  for (const config of [presets['deepseek-v3'], undefined] as never[]) {
    expect(() => countParameters(config)).toThrow('the configuration lacks defaults; pass parseConfig(config)')
  }
  const model = new DeepSeek(tiny)
  expect(() => model.generate([1], { maxToken: 3 } as never)).toThrow('did you mean maxTokens?')
  expect(() => model.makeCache({ capcity: 3 } as never)).toThrow('did you mean capacity?')
  model.dispose()
})

describe('fromPretrained with changes of the configuration', () => {
  const yarn = { type: 'yarn', factor: 4, mscale: 1, mscale_all_dim: 1 } as const
  const folders: string[] = []
  afterEach(async () => {
    for (const folder of folders.splice(0)) await rm(folder, { recursive: true })
  })
  /** Saves a model with this configuration, then rewrites its config.json. */
  const saved = async (changes: object, rewrite: (json: Record<string, unknown>) => object = json => json) => {
    const folder = await mkdtemp(join(tmpdir(), 'moe-config-'))
    folders.push(folder)
    const model = new DeepSeek({ ...tiny, max_position_embeddings: 128, ...changes } as DeepSeekConfigInput, {
      seed: 1,
    })
    await model.save(folder)
    model.dispose()
    const file = join(folder, 'config.json')
    await writeFile(file, JSON.stringify(rewrite(JSON.parse(await readFile(file, 'utf8')))))
    return folder
  }
  const opened = async (folder: string, config: Partial<LatentConfigInput>) => {
    const model = await DeepSeek.fromPretrained(folder, { config })
    model.dispose()
    return model.config
  }

  test('extends the context from the trained length', async () => {
    const folder = await saved({})
    const config = await opened(folder, { max_position_embeddings: 512, rope_scaling: yarn })
    expect(config).toMatchObject({
      max_position_embeddings: 512,
      rope_scaling: { factor: 4, original_max_position_embeddings: 128 },
    })
    expect(config).toEqual(parseConfig({ ...config, rope_scaling: { ...yarn, original_max_position_embeddings: 128 } }))
  })

  test('takes rope_parameters of transformers 5 like rope_scaling, with their base', async () => {
    const rope_parameters = { rope_type: 'yarn', rope_theta: 7000, factor: 4 }
    const extended = await saved({ rope_scaling: { ...yarn, factor: 2, original_max_position_embeddings: 64 } })
    for (const [folder, original] of [
      [await saved({}), 128],
      [extended, 64],
    ] as const) {
      expect(await opened(folder, { max_position_embeddings: 512, rope_parameters })).toMatchObject({
        rope_theta: 7000,
        rope_scaling: { factor: 4, original_max_position_embeddings: original },
      })
    }
    expect((await opened(extended, { rope_parameters: { rope_type: 'default' } })).rope_scaling).toBeNull()
    expect((await opened(extended, { rope_scaling: null })).rope_scaling).toBeNull()
  })

  test('keeps the original length of a context that was extended before, in both formats of the file', async () => {
    const folder = await saved({
      rope_theta: 5000,
      rope_scaling: { ...yarn, factor: 2, original_max_position_embeddings: 64 },
    })
    const inParameters = await saved({}, ({ rope_scaling: _, rope_theta: __, ...json }) => ({
      ...json,
      // The format of transformers 5.
      rope_parameters: {
        ...yarn,
        rope_type: 'yarn',
        factor: 2,
        rope_theta: 5000,
        original_max_position_embeddings: 64,
      },
    }))
    for (const at of [folder, inParameters]) {
      const further = await opened(at, { max_position_embeddings: 512, rope_scaling: { ...yarn, factor: 8 } })
      expect(further).toMatchObject({
        rope_theta: 5000,
        rope_scaling: { factor: 8, original_max_position_embeddings: 64 },
      })
      const same = await opened(at, { max_position_embeddings: 512 })
      expect(same).toMatchObject({
        rope_theta: 5000,
        rope_scaling: { factor: 2, original_max_position_embeddings: 64 },
      })
    }
  })

  test('rejects other sizes than those of the weights, and unknown fields', async () => {
    const folder = await saved({})
    await expect(opened(folder, { hidden_size: 96 })).rejects.toThrow(expect.objectContaining({ code: 'E_STATE_DICT' }))
    await expect(opened(folder, { rope_scalling: yarn } as never)).rejects.toThrow(/rope_scaling/)
  })
})

test('kimi_k2 is the same architecture as deepseek_v3', () => {
  expect(parseConfig({ ...tiny, model_type: 'kimi_k2' })).toEqual(parseConfig(tiny))
})

test('rope_scaling needs a type; its original context defaults to max_position_embeddings', () => {
  const scaled = (rope_scaling: object) => parseConfig({ ...tiny, max_position_embeddings: 64, rope_scaling })
  expect(() => scaled({ factor: 4 })).toThrow(/rope_scaling\.type is missing/)
  expect(scaled({ type: 'yarn', factor: 4 }).rope_scaling).toMatchObject({ original_max_position_embeddings: 64 })
})

test('one message names all problems of a configuration', () => {
  const broken = { ...tiny, hidden_size: -1, vocab_size: 'many', n_group: 3 }
  expect(() => parseConfig(broken)).toThrow(/2 problems[\s\S]*vocab_size[\s\S]*hidden_size/)
  // Settings of each layer would fill the memory.
  expect(make({ num_hidden_layers: 2 ** 40 })).toThrow('num_hidden_layers: at most 10000 layers are supported')
  expect(() =>
    parseConfig({ ...tiny, n_routed_experts: 8, n_group: 3, qk_rope_head_dim: 3, num_experts_per_tok: 9 }),
  ).toThrow(/3 problems[\s\S]*odd[\s\S]*exceeds n_routed_experts = 8[\s\S]*n_group = 3 does not divide/)
})
