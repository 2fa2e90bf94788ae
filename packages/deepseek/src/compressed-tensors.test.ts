/** @file Checkpoints quantized by compressed-tensors, as those of Kimi K2 Thinking and K2.5. Values of single weights: packed-int4.test.ts of @moe/checkpoint. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type TensorEntry, writeSafetensors } from '@moe/checkpoint'
import { type Backend, decodeHost, encodeHost, fromHost, setDefaultBackend, stateDict } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeepSeek, type DeepSeekOptions, exportGguf, hfConfig, loadWeights, parseConfig } from './index.ts'
import { tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterEach(() => expect(reference.stats().handles).toBe(0))
const root = await mkdtemp(join(tmpdir(), 'moe-compressed-tensors-'))
afterAll(async () => {
  native.dispose()
  await rm(root, { recursive: true })
})

const config = parseConfig({ ...tiny, hidden_size: 64, moe_intermediate_size: 32, num_nextn_predict_layers: 0 })
const isOfExpert = (name: string) => /\.experts\.\d+\./.test(name)

type Weights = Record<string, unknown>
const int4: Weights = {
  num_bits: 4,
  type: 'int',
  symmetric: true,
  strategy: 'group',
  group_size: 32,
  block_structure: null,
  dynamic: false,
  actorder: null,
  observer: 'minmax',
  observer_kwargs: {},
}
const quantization = (weights: Weights, format = 'pack-quantized', more: object = {}) => ({
  config_groups: { group_0: { input_activations: null, output_activations: null, targets: ['Linear'], weights } },
  format,
  ignore: ['lm_head', 're:.*self_attn.*', 're:.*shared_experts.*'],
  kv_cache_scheme: null,
  quant_method: 'compressed-tensors',
  quantization_status: 'compressed',
  ...more,
})

/** A checkpoint with experts in 4 bits, all codes, and scales in bf16; and the values of all weights. */
async function packed(group: number | null, quantization_config: object, nested = false) {
  const folder = await mkdtemp(join(root, 'packed-'))
  const model = new DeepSeek(config, { seed: 2 })
  const prefix = nested ? 'language_model.' : ''
  const entries: TensorEntry[] = []
  const expected = new Map<string, Float32Array>()
  for (const { name, shape, data } of stateDict(model)) {
    const values = (await data()) as Float32Array
    if (!isOfExpert(name)) {
      entries.push({ name: prefix + name, dtype: 'f32', shape, data: values })
      expected.set(name, values)
      continue
    }
    const [rows, columns] = shape
    const size = group ?? columns
    const scales = rows * (columns / size)
    const scale = encodeHost(
      'bf16',
      Float32Array.from({ length: scales }, (_, i) => 0.01 + 0.003 * (i % 7)),
    ) as Uint16Array<ArrayBuffer>
    const codes = values.map((x, i) => (i % 16) - 8 + 0 * x)
    const words = new Int32Array(values.length / 8)
    codes.forEach((code, i) => {
      words[i >> 3] |= (code + 8) << (4 * (i % 8))
    })
    entries.push({ name: `${prefix}${name}_packed`, dtype: 'i32', shape: [rows, columns / 8], data: words })
    entries.push({ name: `${prefix}${name}_scale`, dtype: 'bf16', shape: [rows, columns / size], data: scale })
    entries.push({ name: `${prefix}${name}_shape`, dtype: 'i32', shape: [2], data: Int32Array.of(rows, columns) })
    const factors = decodeHost('bf16', scale)
    expected.set(name, codes.map((code, i) => code * factors[Math.floor(i / size)]) as Float32Array)
  }
  model.dispose()
  await writeSafetensors(join(folder, 'model.safetensors'), entries)
  const text = { ...hfConfig(config), quantization_config }
  const json = nested ? { model_type: 'kimi_k25', text_config: text } : text
  await writeFile(join(folder, 'config.json'), JSON.stringify(json))
  return { folder, expected }
}

async function expectWeights(model: DeepSeek, expected: Map<string, Float32Array>, of = (_: string) => true) {
  const entries = stateDict(model).filter(({ name }) => of(name))
  expect(entries.length).toBeGreaterThan(20)
  for (const { name, data } of entries) expect([name, await data()]).toEqual([name, expected.get(name)])
}

describe('4-bit weights', () => {
  test.each([
    ['alone', 32, false, int4],
    ['in a multimodal model', 32, true, int4],
    ['in groups of 16', 16, false, { ...int4, group_size: 16, actorder: 'static' }],
  ])('become f32, or int4 without rounding: %s', async (_, group, nested, weights) => {
    const { folder, expected } = await packed(group, quantization(weights), nested)
    const model = await DeepSeek.fromPretrained(folder)
    await expectWeights(model, expected)
    const filled = new DeepSeek(config, { seed: 5 })
    await loadWeights(filled, folder)
    await expectWeights(filled, expected)
    const stored = await DeepSeek.fromPretrained(folder, { weights: 'int4' })
    if (group === 32) await expectWeights(stored, expected, isOfExpert)
    else await expect(expectWeights(stored, expected, isOfExpert)).rejects.toThrow()
    const { tensors } = await exportGguf(folder, join(root, `${group}.gguf`), { type: 'f32', tokenizer: 'none' })
    expect(tensors).toBeGreaterThan(20)
    for (const each of [model, filled, stored]) each.dispose()
  })

  test('of all codes give the same logits on all backends', async () => {
    const { folder } = await packed(32, quantization(int4))
    const logits = async (backend: Backend, options: DeepSeekOptions) => {
      const model = await DeepSeek.fromPretrained(folder, { backend, ...options })
      const ids = fromHost(Int32Array.of(5, 9, 2, 7, 30, 31), [1, 6], 'i32', backend)
      const out = model.infer(() => model.forward(ids))
      const values = await out.values()
      for (const each of [ids, out, model]) each.dispose()
      return values
    }
    const [expected, found] = [await logits(reference, { weights: 'int4' }), await logits(native, { weights: 'int4' })]
    assertClose('logits', found, expected, { relative: 1e-4, absolute: 1e-4 })
  })

  test('with one scale per row become f32', async () => {
    const { folder, expected } = await packed(null, quantization({ ...int4, strategy: 'channel', group_size: null }))
    const model = await DeepSeek.fromPretrained(folder)
    await expectWeights(model, expected)
    model.dispose()
  })

  test('are rounded to other formats', async () => {
    const { folder, expected } = await packed(32, quantization(int4))
    const model = await DeepSeek.fromPretrained(folder, { weights: 'int8' })
    for (const { name, data } of stateDict(model).filter(({ name }) => isOfExpert(name))) {
      // The largest value of a row is 8 * 0.028, of which int8 has steps of 1/127.
      assertClose(name, (await data()) as Float32Array, expected.get(name) ?? [], { relative: 0, absolute: 0.001 })
    }
    model.dispose()
  })
})

test.each([
  ['tensor', [1], {}],
  ['channel', null, {}],
  ['block', null, { block_structure: [16, 32] }],
] as const)('fp8 weights with strategy %s become f32', async (strategy, scalar, more) => {
  const folder = await mkdtemp(join(root, 'fp8-'))
  const model = new DeepSeek(config, { seed: 2 })
  const entries: TensorEntry[] = []
  const expected = new Map<string, Float32Array>()
  for (const { name, shape, data } of stateDict(model)) {
    const values = (await data()) as Float32Array
    if (shape.length !== 2 || !name.includes('_proj')) {
      entries.push({ name, dtype: 'f32', shape, data: values })
      expected.set(name, values)
      continue
    }
    const [rows, columns] = shape
    const block = strategy === 'block' ? [16, 32] : strategy === 'channel' ? [1, columns] : [rows, columns]
    const across = Math.ceil(columns / block[1])
    const scales = Math.ceil(rows / block[0]) * across
    const scale = Float32Array.from({ length: scales }, (_, i) => 2 ** -(i % 5))
    entries.push({ name, dtype: 'f8e4m3', shape, data: Uint8Array.from(values, x => (x < 0 ? 0xb8 : 0x38)) })
    entries.push({ name: `${name}_scale`, dtype: 'f32', shape: scalar ?? [scales / across, across], data: scale })
    const scaled = values.map((x, i) => {
      const at = Math.floor(Math.floor(i / columns) / block[0]) * across + Math.floor((i % columns) / block[1])
      return (x < 0 ? -1 : 1) * scale[at]
    })
    expected.set(name, scaled)
  }
  model.dispose()
  await writeSafetensors(join(folder, 'model.safetensors'), entries)
  const weights = { num_bits: 8, type: 'float', symmetric: true, strategy, dynamic: false, ...more }
  const quantization_config = quantization(weights, 'float-quantized')
  await writeFile(join(folder, 'config.json'), JSON.stringify({ ...hfConfig(config), quantization_config }))
  const opened = await DeepSeek.fromPretrained(folder)
  await expectWeights(opened, expected)
  opened.dispose()
})

test.each<[string, unknown]>([
  ['8-bit integers', quantization({ ...int4, num_bits: 8 })],
  ['zero points', quantization({ ...int4, symmetric: false })],
  ['permuted columns', quantization({ ...int4, actorder: 'group' })],
  ['permuted columns, as before', quantization({ ...int4, actorder: true })],
  ['groups without a size', quantization({ ...int4, group_size: null })],
  ['groups of 0', quantization({ ...int4, group_size: 0 })],
  ['groups of a fraction', quantization({ ...int4, group_size: 1.5 })],
  ['groups of text', quantization({ ...int4, group_size: '32' })],
  ['another format', quantization(int4, 'nvfp4-pack-quantized')],
  [
    'another format of a group',
    quantization(int4, 'pack-quantized', { config_groups: { a: { weights: int4, format: 'dense' } } }),
  ],
  ['weights that are not compressed', quantization(int4, 'pack-quantized', { quantization_status: 'frozen' })],
  ['no groups', quantization(int4, 'pack-quantized', { config_groups: {} })],
  [
    'groups of two kinds',
    quantization(int4, 'pack-quantized', {
      config_groups: { a: { weights: int4 }, b: { weights: { ...int4, group_size: 16 } } },
    }),
  ],
  ['groups without weights', quantization(int4, 'pack-quantized', { config_groups: { a: { weights: null } } })],
  ['a list', [int4]],
  ['a name', 'int4'],
])('%s are rejected', async (_, quantization_config) => {
  const folder = await mkdtemp(join(root, 'rejected-'))
  await writeFile(join(folder, 'config.json'), JSON.stringify({ ...hfConfig(config), quantization_config }))
  await expect(DeepSeek.fromPretrained(folder)).rejects.toMatchObject({
    code: 'E_UNSUPPORTED',
    message: expect.stringMatching(
      /config\.json: unsupported quantization: .*; use a checkpoint in f32.*pack-quantized, strategy group or channel/,
    ),
  })
})
