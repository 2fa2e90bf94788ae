import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { loadAdapters, readSafetensors, saveAdapters, type TensorSource } from '@moe/checkpoint'
import {
  adamwStep,
  addAdapters,
  backward,
  fromHost,
  full,
  globalNorm,
  mergeAdapters,
  namedAdapters,
  namedParameters,
  ones,
  quantizeWeights,
  Random,
  randn,
  scope,
  setDefaultBackend,
  type Tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { DeepSeek, exportGguf, presets } from './index.ts'

setDefaultBackend(referenceBackend())

const fixture = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
const base = fixture('v3-base')
const quiet = { mtpWeight: 0, balanceWeight: 0, biasSpeed: 0 }
const tolerance = { relative: 1e-4, absolute: 1e-4 }
const gradientTolerance = { relative: 1e-3, absolute: 1e-4 }

interface Expected {
  loss: number
  adamw?: { lr: number; betas: [number, number]; eps: number; weightDecay: number; clipNorm: number; losses: number[] }
}

const floats = async (file: TensorSource, key: string) => (await file.read(key)).data as Float32Array

async function batch() {
  await using file = await readSafetensors(join(base, 'expected.safetensors'))
  const { shape, data } = await file.read('input_ids')
  return { ids: data as Int32Array, rows: shape[0], time: shape[1] }
}

/** Training rows of the fixture's ids, padded by a token without loss. */
async function rowsOf() {
  const { ids, rows, time } = await batch()
  const length = time + 1
  const tokens = new Int32Array(rows * length)
  const documents = Int32Array.from({ length: rows * length }, (_, i) => (i % length === time ? -1 : 0))
  for (let row = 0; row < rows; row++) tokens.set(ids.subarray(row * time, (row + 1) * time), row * length)
  return { tokens, documents, rows, length }
}

async function logitsOf(model: DeepSeek): Promise<Float32Array> {
  const { ids, rows, time } = await batch()
  using logits = model.infer(() => model.forward(fromHost(ids, [rows, time], 'i32')))
  return Float32Array.from(await logits.values())
}

describe.each(['adapters-attention', 'adapters-experts'])('PEFT: %s', name => {
  test('logits, loss, all gradients and the losses of AdamW steps are the same', async () => {
    const expected = JSON.parse(await readFile(join(fixture(name), 'fixture.json'), 'utf8')) as Expected
    await using file = await readSafetensors(join(fixture(name), 'expected.safetensors'))
    const model = await DeepSeek.fromPretrained(fixture(name), { objective: quiet })
    assertClose('logits', await logitsOf(model), await floats(file, 'logits'), tolerance)
    const rows = await rowsOf()
    const parameters = namedParameters(model).filter(({ parameter }) => parameter.trainable)
    expect(parameters.length).toBe(2 * namedAdapters(model).length)
    const moments = parameters.map(({ parameter }) => ({ m: zeros(parameter.shape), v: zeros(parameter.shape) }))
    const { losses, lr, betas, eps, weightDecay, clipNorm } = expected.adamw ?? ({ losses: [expected.loss] } as never)
    for (let step = 1; step <= losses.length; step++) {
      const loss = scope(() => {
        const { loss } = model.loss(rows)
        const value = loss.detach()
        backward(loss)
        return value
      })
      const relative = step === 1 ? 1e-5 : 1e-3
      assertClose(`loss of step ${step}`, [await loss.item()], [losses[step - 1]], { relative, absolute: 0 })
      if (step === 1) {
        for (const { name: key, parameter, slices } of parameters) {
          const keys = (slices ?? [key]).map(slice => `grad.base_model.model.${slice}`)
          const parts = await Promise.all(keys.map(slice => floats(file, slice)))
          const gradient = await (parameter.grad as Tensor).values()
          assertClose(
            key,
            gradient,
            parts.flatMap(part => [...part]),
            gradientTolerance,
          )
        }
      }
      if (expected.adamw === undefined) break
      const norm = globalNorm(parameters.map(({ parameter }) => parameter.grad as Tensor))
      const scale = full([], clipNorm).div(norm.add(1e-6)).minimum(ones([]))
      for (const [i, { parameter }] of parameters.entries()) {
        const attrs = { lr, beta1: betas[0], beta2: betas[1], eps, weightDecay, step }
        const next = adamwStep(parameter, parameter.grad as Tensor, moments[i].m, moments[i].v, scale, attrs)
        parameter.assign(next.param)
        moments[i] = { m: next.m, v: next.v }
        parameter.zeroGrad()
      }
    }
    model.dispose()
  })
})

describe('a model with adapters', () => {
  const config = {
    ...presets.tiny,
    vocab_size: 96,
    hidden_size: 32,
    intermediate_size: 48,
    moe_intermediate_size: 16,
    num_hidden_layers: 2,
    num_nextn_predict_layers: 1,
  }
  let folder: string
  let plain: string
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'adapters-'))
    plain = join(folder, 'base')
    const model = new DeepSeek(config, { seed: 1 })
    // Large enough that rounding does not change the most likely token.
    for (const { parameter } of namedParameters(model)) {
      if (parameter.trainable && parameter.shape.length > 1) parameter.assign(parameter.mul(6).detach())
    }
    await model.save(plain)
    model.dispose()
  })
  afterAll(() => rm(folder, { recursive: true }))

  /** The base model with adapters whose values are large enough to change its outputs. */
  async function adapted(weights?: 'int8'): Promise<DeepSeek> {
    const model = await DeepSeek.fromPretrained(plain, { weights })
    addRandomAdapters(model)
    return model
  }

  function addRandomAdapters(model: DeepSeek): void {
    addAdapters(model, { rank: 4 })
    for (const [i, { adapter }] of namedAdapters(model).entries()) {
      adapter.up.assign(randn(adapter.up.shape, new Random(9).fork(`${i}`), { std: 0.1 }))
    }
  }

  const prompt = [3, 1, 4, 1, 5, 9, 2, 6]
  const textOf = async (model: DeepSeek, options = {}) => {
    const tokens: number[] = []
    for await (const token of model.generate(prompt, { maxTokens: 24, precision: 'f32', ...options }))
      tokens.push(token)
    return tokens
  }
  const idsOf = (model: DeepSeek) =>
    model.infer(() => model.forward(fromHost(Int32Array.from(prompt), [1, prompt.length], 'i32'))).values()

  test('has them on attention, experts, dense MLPs and MTP, but not on embedding, head and gate', async () => {
    const model = await adapted()
    const names = namedAdapters(model).map(({ name }) => name.replace(/layers\.\d+/, 'layers.N'))
    const attention = ['q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj'].map(
      name => `self_attn.${name}.weight`,
    )
    const net = ['gate_proj', 'up_proj', 'down_proj']
    const expected = [
      ...attention,
      ...net.flatMap(name => [`mlp.${name}.weight`, `mlp.experts.${name}`, `mlp.shared_experts.${name}.weight`]),
      'eh_proj.weight',
    ]
    expect([...new Set(names)].sort()).toEqual(expected.map(name => `model.layers.N.${name}`).sort())
    model.dispose()
  })

  test.each([{}, { speculative: true }])('generates the same text as after merging them: %o', async options => {
    const model = await adapted()
    const [logits, text] = [await idsOf(model), await textOf(model, options)]
    const before = await DeepSeek.fromPretrained(plain)
    expect(text).not.toEqual(await textOf(before, options))
    await mergeAdapters(model)
    assertClose('logits', await idsOf(model), logits, tolerance)
    expect(await textOf(model, options)).toEqual(text)
    model.dispose()
    before.dispose()
  })

  test('recomputes absorbed weights of kv_b_proj when the adapter changes', async () => {
    const model = await adapted()
    const text = await textOf(model)
    for (const { name, adapter } of namedAdapters(model)) {
      if (name.includes('kv_b_proj')) adapter.up.assign(adapter.up.mul(-3).detach())
    }
    const changed = await textOf(model)
    expect(changed).not.toEqual(text)
    expect(changed).toEqual(await textOf(model, { speculative: true }))
    model.dispose()
  })

  test('gives the same logits on int8 weights as on the dequantized weights', async () => {
    const quantized = await adapted('int8')
    const dense = await DeepSeek.fromPretrained(plain)
    const rounded = await DeepSeek.fromPretrained(plain, { weights: 'int8' })
    await rounded.save(join(folder, 'rounded'))
    const reopened = await DeepSeek.fromPretrained(join(folder, 'rounded'))
    addRandomAdapters(reopened)
    assertClose('logits', await idsOf(quantized), await idsOf(reopened), tolerance)
    expect(await idsOf(quantized)).not.toEqual(await idsOf(dense))
    for (const model of [quantized, dense, rounded, reopened]) model.dispose()
  })

  test('is saved as adapters, which open alone or on a base model, and can be merged, exported and quantized', async () => {
    const model = await adapted()
    const own = join(folder, 'own')
    await expect(model.save(join(folder, 'whole'))).rejects.toThrow(/adapters/)
    await expect(exportGguf(model, join(folder, 'model.gguf'))).rejects.toThrow(/adapters/)
    await saveAdapters(own, model, { base: model.source })
    await expect(exportGguf(own, join(folder, 'model.gguf'))).rejects.toThrow(/own contains adapters.*mergeAdapters/)
    const reopened = await DeepSeek.fromPretrained(own)
    expect(await idsOf(reopened)).toEqual(await idsOf(model))
    expect(reopened.source).toBe(plain)
    const quantized = await DeepSeek.fromPretrained(own, { weights: 'int8' })
    expect(namedAdapters(quantized).length).toBe(namedAdapters(model).length)
    const loaded = await DeepSeek.fromPretrained(plain)
    await loadAdapters(loaded, own)
    expect(await idsOf(loaded)).toEqual(await idsOf(model))
    await mergeAdapters(loaded)
    await loaded.save(join(folder, 'merged'))
    const merged = await DeepSeek.fromPretrained(join(folder, 'merged'))
    assertClose('logits', await idsOf(merged), await idsOf(model), tolerance)
    await exportGguf(merged, join(folder, 'merged.gguf'), { tokenizer: 'none', type: 'f32' })
    await quantizeWeights(reopened, 'int4')
    expect(namedAdapters(reopened).length).toBe(namedAdapters(model).length)
    for (const one of [model, reopened, quantized, loaded, merged]) one.dispose()
  })

  test('is rejected if its base model is missing or different', async () => {
    const model = await adapted()
    const own = join(folder, 'lost')
    await saveAdapters(own, model, { base: 'deepseek-ai/DeepSeek-V3' })
    await expect(DeepSeek.fromPretrained(own)).rejects.toThrow(/deepseek-ai.*loadAdapters/s)
    const other = await DeepSeek.fromPretrained(plain)
    other.model.norm.weight.assign(other.model.norm.weight.mul(1.1).detach())
    await other.save(join(folder, 'other'))
    await saveAdapters(own, model, { base: '../other' })
    await expect(DeepSeek.fromPretrained(own)).rejects.toThrow(/a different base model/)
    await expect(loadAdapters(other, own)).rejects.toThrow(/a different base model/)
    expect(namedAdapters(other)).toEqual([])
    await cp(join(plain, 'config.json'), join(own, 'config.json'))
    await writeFile(join(own, 'tokenizer.json'), '{}')
    await expect(DeepSeek.fromPretrained(own)).rejects.toThrow(/safetensors/)
    for (const one of [model, other]) one.dispose()
  })

  test('keeps selection biases and base weights unchanged in training, until adapters are merged', async () => {
    const model = await adapted()
    const before = await Promise.all(namedParameters(model).map(({ parameter }) => parameter.values()))
    const rows = {
      rows: 2,
      length: 10,
      tokens: Int32Array.from({ length: 20 }, (_, i) => (i * 7) % 96),
      documents: new Int32Array(20),
    }
    scope(() => backward(model.loss(rows).loss))
    const { maxVio } = await model.afterStep()
    expect(maxVio).toBeGreaterThan(0)
    // With loads summed over ranks.
    await model.afterStep(async counts =>
      counts.map(({ size, shape }) =>
        fromHost(
          Int32Array.from({ length: size }, (_, i) => i),
          shape,
          'i32',
        ),
      ),
    )
    const after = await Promise.all(namedParameters(model).map(({ parameter }) => parameter.values()))
    expect(after).toEqual(before)
    await mergeAdapters(model)
    scope(() => backward(model.loss(rows).loss))
    await model.afterStep()
    const bias = model.moeLayers[0].gate.e_score_correction_bias as Tensor
    expect(Math.max(...(await bias.values()).map(Math.abs))).toBeGreaterThan(0)
    model.dispose()
  })
})
