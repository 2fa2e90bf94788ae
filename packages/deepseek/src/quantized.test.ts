import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type Backend,
  defaultBackend,
  type Precision,
  quantizeWeights,
  setDefaultBackend,
  type Tensor,
  tensor,
  type WeightFormat,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { afterAll, describe, expect, test } from 'vitest'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions, presets } from './index.ts'

setDefaultBackend(referenceBackend())

const folder = await mkdtemp(join(tmpdir(), 'moe-quantized-'))
afterAll(() => rm(folder, { recursive: true }))

const config: DeepSeekConfigInput = {
  ...presets.tiny,
  vocab_size: 50,
  hidden_size: 48,
  intermediate_size: 64,
  moe_intermediate_size: 32,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  n_routed_experts: 4,
  num_experts_per_tok: 2,
  q_lora_rank: 24,
  kv_lora_rank: 16,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  initializer_range: 0.2,
  eos_token_id: null,
  bos_token_id: null,
}
const prompt = Int32Array.of(3, 7, 11, 2, 30, 41, 8)
const formats: readonly WeightFormat[] = ['bf16', 'fp8', 'int8', 'int4']

/** The logits of the prompt, in one pass or token by token with the latent cache. */
async function logits(model: DeepSeek, cached = false): Promise<Float32Array> {
  if (!cached) {
    using whole = model.infer(() => model.forward(tensor(prompt, [1, prompt.length])))
    return (await whole.values()) as Float32Array
  }
  const cache = model.makeCache()
  const steps: Tensor[] = []
  for (const id of prompt) steps.push(model.infer(() => model.forward(tensor(Int32Array.of(id), [1, 1]), { cache })))
  const parts = await Promise.all(steps.map(step => step.values()))
  for (const step of steps) step.dispose()
  cache.dispose()
  return Float32Array.from(parts.flatMap(part => [...part]))
}

/** The root mean square difference, relative to that of the expected values. */
function difference(actual: Float32Array, expected: Float32Array): number {
  let [error, power] = [0, 0]
  for (const [i, e] of expected.entries()) {
    error += (actual[i] - e) ** 2
    power += e ** 2
  }
  return Math.sqrt(error / power)
}

/**
 * The relative rounding error of a weight is 2^-8 / sqrt(3) in bf16 and 2^-4 / sqrt(3) in fp8. An integer has a step of 2.5 standard deviations (about the largest of a
 * block) over 127 or 7, and an error of that over sqrt(12). Errors of weights are independent, so each product adds as much to its output, and the
 * products on the longest path (seven in each of two layers, and the head) add by squares: times sqrt(15). The factor 1.5 is a margin.
 */
const bound: Readonly<Record<WeightFormat, number>> = {
  bf16: (2 ** -8 / 3 ** 0.5) * 15 ** 0.5 * 1.5,
  fp8: (2 ** -4 / 3 ** 0.5) * 15 ** 0.5 * 1.5,
  int8: (2.5 / 127 / 12 ** 0.5) * 15 ** 0.5 * 1.5,
  int4: (2.5 / 7 / 12 ** 0.5) * 15 ** 0.5 * 1.5,
}

describe.each(formats)('a model with weights in %s', format => {
  test('has logits within the rounding errors of its weights, with and without a cache', async () => {
    const model = new DeepSeek(config, { seed: 1 })
    const exact = await logits(model)
    await quantizeWeights(model, format)
    const off = difference(await logits(model), exact)
    expect(off).toBeGreaterThan(bound[format] / 100)
    expect(off).toBeLessThan(bound[format])
    expect(difference(await logits(model, true), exact)).toBeLessThan(bound[format])
    model.dispose()
  })

  test('has the same logits with a cache as without, and leaks nothing', async () => {
    const before = defaultBackend().stats().handles
    const model = new DeepSeek(config, { seed: 2, weights: format })
    // Absorbed W_UK and W_UV are rounded to bf16, in two of the products of each layer.
    expect(difference(await logits(model, true), await logits(model))).toBeLessThan(bound.bf16)
    const ids: number[] = []
    for await (const id of model.generate(prompt, { maxTokens: 8, speculative: true })) ids.push(id)
    expect(ids).toHaveLength(8)
    model.dispose()
    expect(defaultBackend().stats().handles).toBe(before)
  })

  test('is quantized while reading a checkpoint, and saved dequantized', async () => {
    const before = defaultBackend().stats().handles
    const model = new DeepSeek(config, { seed: 3 })
    const path = join(folder, format)
    await model.save(path)
    await quantizeWeights(model, format)
    const loaded = await DeepSeek.fromPretrained(path, { weights: format })
    const expected = await logits(model)
    expect(await logits(loaded)).toEqual(expected)
    await loaded.save(`${path}-again`)
    const plain = await DeepSeek.fromPretrained(`${path}-again`)
    expect(difference(await logits(plain), expected)).toBeLessThan(1e-6)
    for (const each of [model, loaded, plain]) each.dispose()
    expect(defaultBackend().stats().handles).toBe(before)
  })
})

test('a tied head and embedding share one stored weight', async () => {
  const model = new DeepSeek({ ...config, tie_word_embeddings: true }, { seed: 4, weights: 'int8' })
  expect(model.lm_head.weight).toBe(model.model.embed_tokens.weight)
  const exact = await logits(new DeepSeek({ ...config, tie_word_embeddings: true }, { seed: 4 }))
  expect(difference(await logits(model), exact)).toBeLessThan(bound.int8)
})

test('the loss of a quantized model can be computed', async () => {
  const model = new DeepSeek({ ...config, num_nextn_predict_layers: 0 }, { seed: 5 })
  const rows = { rows: 1, length: prompt.length, tokens: prompt, documents: new Int32Array(prompt.length) }
  const loss = () => model.infer(() => model.loss(rows, { training: false }).loss).item()
  const exact = await loss()
  await quantizeWeights(model, 'int8')
  expect(Math.abs((await loss()) - exact)).toBeLessThan(0.05)
  expect(await loss()).not.toBe(exact)
})

test('generation multiplies quantized weights in bf16, unless f32 is requested', async () => {
  const reference = referenceBackend()
  const seen = new Set<string>()
  const backend: Backend = {
    ...reference,
    fused: {
      ...reference.fused,
      quantizedMatmul(inputs, attrs, outputs) {
        seen.add(attrs.precision)
        return reference.fused.quantizedMatmul?.(inputs, attrs, outputs)
      },
    },
    primitives: {
      ...reference.primitives,
      matmul(inputs, attrs, outputs) {
        seen.add(`${attrs.precision} plain`)
        return reference.primitives.matmul(inputs, attrs, outputs)
      },
    },
  }
  const used = async (options: DeepSeekOptions, precision?: Precision) => {
    const model = new DeepSeek({ ...config, num_nextn_predict_layers: 1 }, { seed: 6, backend, ...options })
    seen.clear()
    for await (const _ of model.generate(prompt, { maxTokens: 4, speculative: true, precision }));
    model.dispose()
    return [...seen].sort()
  }
  const quantized = await used({ weights: 'int8' })
  expect(quantized).toContain('bf16')
  expect(quantized).not.toContain('f32')
  expect(await used({ weights: 'int8' }, 'f32')).toEqual(['f32', 'f32 plain'])
  expect(await used({})).toEqual(['f32 plain'])
  // The router's affinities are always f32.
  expect(await used({}, 'bf16')).toEqual(['bf16 plain', 'f32 plain'])
})
