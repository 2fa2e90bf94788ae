/** @file Models whose queries are scaled by their positions (Mistral Small 4). Numbers of transformers: transformers.test.ts. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readSafetensors, type TensorEntry, writeSafetensors } from '@moe/checkpoint'
import { type Backend, backward, namedParameters, scope, setDefaultBackend, stateDict } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import { changedConfig } from './config.ts'
import { DeepSeek, exportGguf, type LatentConfigInput, parseConfig, presets } from './index.ts'
import { prompts, read, scoresOf, withoutCache } from './test-generation.ts'
import { tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterEach(() => expect(reference.stats().handles).toBe(0))
const root = await mkdtemp(join(tmpdir(), 'moe-scaled-queries-'))
afterAll(async () => {
  native.dispose()
  await rm(root, { recursive: true })
})

const yarn = { type: 'yarn', factor: 8, original_max_position_embeddings: 4, mscale: 1, mscale_all_dim: 1 }
const { topk_method, scoring_func, n_group, topk_group, ...rest } = tiny
const config = {
  ...rest,
  model_type: 'mistral4',
  num_nextn_predict_layers: 0,
  rope_scaling: { ...yarn, llama_4_scaling_beta: 0.8 },
} satisfies LatentConfigInput
const unscaled = { ...config, rope_scaling: { ...yarn, llama_4_scaling_beta: 0 } }
const fixture = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))

describe.each([
  ['the reference backend', () => reference as Backend],
  ['a backend that records', () => native as Backend],
])('on %s', (_, of) => {
  test('generation, sessions and batches continue as without a cache, past several contexts', async () => {
    const backend = of()
    const { handles } = backend.stats()
    const model = new DeepSeek(config, { seed: 3, backend })
    const other = new DeepSeek(unscaled, { seed: 3, backend })
    const expected: number[][] = []
    for (const prompt of prompts) expected.push(await withoutCache(model, prompt, 12))
    const different = await Promise.all(prompts.map(prompt => withoutCache(other, prompt, 12)))
    expect(different).not.toEqual(expected)
    const session = model.session()
    for (const [i, prompt] of prompts.entries()) {
      expect(await read(model.generate(prompt, { maxTokens: 12 }))).toEqual(expected[i])
      expect(await read(session.generate(prompt, { maxTokens: 12 }))).toEqual(expected[i])
    }
    const batch = model.continuousBatch({ prefillChunkSize: 5 })
    expect(await Promise.all(prompts.map(prompt => read(batch.generate(prompt, { maxTokens: 12 }))))).toEqual(expected)
    for (const each of [session, batch, model, other]) each.dispose()
    expect(backend.stats().handles).toBe(handles)
  })

  test('score is that of the forward pass', async () => {
    const model = new DeepSeek(config, { seed: 3, backend: of() })
    const { found, expected } = await scoresOf(model, prompts[2])
    assertClose('log-probabilities', found, expected, { relative: 1e-4, absolute: 1e-5 })
    model.dispose()
  })
})

test('texts that share a row have the loss and gradients of single texts', async () => {
  const model = new DeepSeek(config, { seed: 3, objective: { balanceWeight: 0, biasSpeed: 0 } })
  const texts = [
    [5, 1, 9, 33, 2, 8, 21],
    [4, 4, 17, 6, 30, 12],
  ]
  const run = async (losses: () => Array<ReturnType<typeof model.loss>['loss']>) => {
    const value = scope(() => {
      const parts = losses()
      const sum = parts.slice(1).reduce((a, b) => a.add(b), parts[0])
      const total = sum.detach()
      backward(sum)
      return total
    })
    const gradients = await Promise.all(namedParameters(model).map(({ parameter }) => parameter.grad?.values()))
    for (const { parameter } of namedParameters(model)) parameter.zeroGrad()
    const loss = await value.item()
    value.dispose()
    return { loss, gradients }
  }
  const row = (tokens: number[], from = 0) => ({
    tokens: Int32Array.from(tokens),
    documents: Int32Array.from(tokens, (_, i) => (i < from ? -1 : 0)),
    rows: 1,
    length: tokens.length,
  })
  // Means over 6 and 5 targets, weighted by their numbers.
  const alone = await run(() => texts.map((text, i) => model.loss(row(text)).loss.mul((6 - i) / 11)))
  const packed = await run(() => {
    const [first, second] = texts
    const documents = Int32Array.from([...first.map(() => 0), ...second.map(() => 1)])
    const starts = Int32Array.from([...first.map(() => 0), ...second.map(() => first.length)])
    return [model.loss({ ...row(texts.flat()), documents, starts }).loss]
  })
  expect(packed.loss).toBeCloseTo(alone.loss, 5)
  for (const [i, gradient] of packed.gradients.entries()) {
    if (gradient === undefined) expect(alone.gradients[i]).toBeUndefined()
    else assertClose('gradient', gradient, alone.gradients[i] ?? [], { relative: 1e-4, absolute: 1e-5 })
  }
  model.dispose()
})

describe('the configuration', () => {
  test('has the RoPE settings and defaults of its class in transformers', () => {
    const { rope_scaling, rope_theta, n_group, topk_group, ...bare } = presets['mistral-small-4']
    expect(parseConfig(bare)).toEqual(parseConfig(presets['mistral-small-4']))
    expect(parseConfig(bare)).toMatchObject({
      topk_method: 'greedy',
      scoring_func: 'softmax',
      norm_topk_prob: true,
      rope_theta: 10000,
      rope_scaling: { factor: 128, original_max_position_embeddings: 8192, llama_4_scaling_beta: 0.1 },
    })
  })

  test.each<[string, object, RegExp]>([
    ['groups', { n_group: 4, topk_group: 2 }, /n_group = 4, but mistral4 always has 1/],
    ['another gate', { scoring_func: 'sigmoid' }, /scoring_func = "sigmoid", but mistral4 always has "softmax"/],
    ['MTP modules', { num_nextn_predict_layers: 1 }, /num_nextn_predict_layers = 1, but mistral4 always has 0/],
    ['no scaling factor', { rope_scaling: yarn }, /llama_4_scaling_beta is missing/],
    ['plain RoPE', { rope_scaling: { type: 'default' } }, /rope_type must be "yarn" for mistral4/],
    [
      'another share of rotated features',
      { rope_scaling: { ...config.rope_scaling, partial_rotary_factor: 1 } },
      /partial_rotary_factor: got 1, expected 0\.333/,
    ],
  ])('is rejected with %s', (_, change, message) => {
    expect(() => parseConfig({ ...config, ...change })).toThrow(message)
  })

  test('keeps the scaling if the context is extended', () => {
    const changed = parseConfig(changedConfig(config, { rope_scaling: { type: 'yarn', factor: 16 } }))
    expect(changed.rope_scaling).toMatchObject({
      factor: 16,
      original_max_position_embeddings: 4,
      llama_4_scaling_beta: 0.8,
    })
  })

  test('cannot be exported to GGUF', async () => {
    await expect(
      exportGguf(fixture('mistral-base'), join(root, 'x.gguf'), { tokenizer: 'none' }),
    ).rejects.toMatchObject({
      code: 'E_UNSUPPORTED',
      message: expect.stringMatching(/type mistral4 cannot be exported: scaling queries by position/),
    })
  })
})

describe('stacked experts', () => {
  const experts = /^(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$/

  test('are saved as in the checkpoint that was read', async () => {
    for (const name of ['mistral-base', 'mistral-padding']) {
      const folder = join(root, name)
      const model = await DeepSeek.fromPretrained(fixture(name))
      await model.save(folder)
      model.dispose()
      await using original = await readSafetensors(join(fixture(name), 'model.safetensors'))
      await using saved = await readSafetensors(join(folder, 'model.safetensors'))
      expect(saved.keys().sort()).toEqual(original.keys().sort())
      expect(saved.keys().filter(key => experts.test(key))).not.toEqual([])
      for (const key of saved.keys()) expect([key, await saved.read(key)]).toEqual([key, await original.read(key)])
    }
  })

  /** A copy of mistral-base in fp8 with scales of powers of two, as part of a multimodal model, and its weights. */
  async function quantized(scalesOf: 'one per matrix' | 'one per pair' | 'scalars') {
    const folder = await mkdtemp(join(root, 'fp8-'))
    await using file = await readSafetensors(join(fixture('mistral-base'), 'model.safetensors'))
    const entries: TensorEntry[] = []
    const expected = new Map<string, (i: number) => number>()
    for (const key of file.keys()) {
      const { shape, data } = await file.read(key)
      const stored = `language_model.${key}`
      if (shape.length === 1 || key === 'model.embed_tokens.weight' || key === 'lm_head.weight') {
        entries.push({ name: stored, dtype: 'f32', shape, data: data as Float32Array })
        continue
      }
      // Codes of 1 and -1, times a scale per expert and projection.
      const codes = Uint8Array.from(data as Float32Array, x => (x < 0 ? 0xb8 : 0x38))
      entries.push({ name: stored, dtype: 'f8e4m3', shape, data: codes })
      const pairs = scalesOf === 'one per matrix' && key.endsWith('gate_up_proj') ? 2 : 1
      const count = shape.length === 3 ? shape[0] * pairs : 1
      const scale = Float32Array.from({ length: count }, (_, i) => 2 ** -(1 + (i % 5)))
      const scaleShape = shape.length === 3 ? [shape[0], pairs, 1] : scalesOf === 'scalars' ? [] : [1, 1]
      const suffix = shape.length === 3 ? '' : '.weight'
      const base = stored.replace(/\.weight$/, '')
      entries.push({ name: `${base}${suffix}_scale_inv`, dtype: 'f32', shape: scaleShape, data: scale })
      const activation = suffix === '' ? `${base}_activation_scale` : `${base}.activation_scale`
      entries.push({ name: activation, dtype: 'f32', shape: [], data: Float32Array.of(1) })
      const size = codes.length / count
      expected.set(key, i => (codes[i] === 0x38 ? 1 : -1) * scale[Math.floor(i / size)])
    }
    entries.push({ name: 'vision_tower.patch', dtype: 'f32', shape: [1], data: Float32Array.of(1) })
    await writeSafetensors(join(folder, 'model.safetensors'), entries)
    const text_config = JSON.parse(await readFile(join(fixture('mistral-base'), 'config.json'), 'utf8'))
    const quantization_config = { quant_method: 'fp8', weight_block_size: null, activation_scheme: 'static' }
    await writeFile(
      join(folder, 'config.json'),
      JSON.stringify({ model_type: 'mistral3', text_config, quantization_config }),
    )
    return { folder, expected }
  }

  test.each(['one per matrix', 'one per pair', 'scalars'] as const)(
    'open in fp8 as part of a multimodal model, with scales: %s',
    async scales => {
      const { folder, expected } = await quantized(scales)
      const model = await DeepSeek.fromPretrained(folder)
      expect(model.config.model_type).toBe('mistral4')
      const { moe_intermediate_size: inner, hidden_size: hidden } = model.config
      let compared = 0
      for (const { name, data } of stateDict(model)) {
        const [, prefix, expert, projection] = /^(.*\.experts)\.(\d+)\.(\w+)\.weight$/.exec(name) ?? []
        const stack = projection === 'down_proj' ? 'down_proj' : 'gate_up_proj'
        const value = expected.get(prefix === undefined ? name : `${prefix}.${stack}`)
        if (value === undefined) continue
        const size = inner * hidden
        const at = stack === 'down_proj' ? Number(expert) : 2 * Number(expert) + (projection === 'up_proj' ? 1 : 0)
        const first = prefix === undefined ? 0 : at * size
        const found = (await data()) as Float32Array
        expect([name, found]).toEqual([name, Float32Array.from(found, (_, i) => value(first + i))])
        compared++
      }
      expect(compared).toBeGreaterThan(3 * 8)
      model.dispose()
    },
  )

  test('are rejected if a block of scales spans two matrices', async () => {
    const { folder } = await quantized('one per matrix')
    const path = join(folder, 'config.json')
    const config = JSON.parse(await readFile(path, 'utf8'))
    config.quantization_config.weight_block_size = [16, 128]
    await writeFile(path, JSON.stringify(config))
    await expect(DeepSeek.fromPretrained(folder)).rejects.toMatchObject({
      code: 'E_UNSUPPORTED',
      message: expect.stringMatching(/gate_up_proj_scale_inv" of shape \[8, 2, 1\] cannot be split/),
    })
  })
})
