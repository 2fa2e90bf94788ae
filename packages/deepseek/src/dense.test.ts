import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import {
  adamwStep,
  backward,
  fromHost,
  namedParameters,
  ones,
  Random,
  scope,
  setDefaultBackend,
  type Tensor,
  tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { afterAll, describe, expect, test } from 'vitest'
import { countParameters, DeepSeek, type DenseConfigInput, parseConfig, presets } from './index.ts'

const backend = referenceBackend()
setDefaultBackend(backend)
const folder = await mkdtemp(join(tmpdir(), 'moe-dense-'))
afterAll(() => rm(folder, { recursive: true }))

const small: DenseConfigInput = {
  ...presets['deepseek-llm-67b'],
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 8,
  initializer_range: 0.3,
  bos_token_id: null,
  eos_token_id: null,
}

describe('DeepSeek LLM', () => {
  test('countParameters equals the counts of transformers, and those of created models', async () => {
    const sizes = fileURLToPath(new URL('../fixtures/llama-sizes.json', import.meta.url))
    const { parameters } = JSON.parse(await readFile(sizes, 'utf8'))
    for (const name of ['deepseek-llm-7b', 'deepseek-llm-67b'] as const) {
      const { total, active, moe, mtp } = countParameters(parseConfig(presets[name]))
      expect([total, active, moe, mtp]).toEqual([parameters[name], parameters[name], 0, 0])
    }
    for (const config of [small, { ...small, head_dim: 10, tie_word_embeddings: true }]) {
      const model = new DeepSeek(config)
      const size = namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0)
      expect(countParameters(model.config).total).toBe(size)
      model.dispose()
    }
  })

  test.each([{ num_key_value_heads: 4 }, { num_key_value_heads: 2 }, { num_key_value_heads: 1, head_dim: 10 }])(
    'greedy decoding with a cache equals full forward passes, %o',
    async changes => {
      const model = new DeepSeek({ ...small, ...changes }, { seed: 2 })
      const ids = [3, 7, 11, 2, 30]
      for (let i = 0; i < 30; i++) {
        const logits = await model.infer(() => model.forward(tensor(Int32Array.from(ids), [1, ids.length]))).values()
        const last = logits.subarray(logits.length - 40)
        ids.push(last.indexOf(Math.max(...last)))
      }
      const handles = backend.stats().handles
      const generated: number[] = []
      for await (const id of model.generate(ids.slice(0, 5), { maxTokens: 30 })) generated.push(id)
      expect(generated).toEqual(ids.slice(5))
      expect(backend.stats().handles).toBe(handles)
      model.dispose()
    },
  )

  test('the cache contains keys and values of shared heads, also in bf16, for sequences of different lengths, and can be truncated', async () => {
    const model = new DeepSeek(small, { seed: 3 })
    const random = new Random(4)
    const ids = Int32Array.from({ length: 14 }, () => random.integer(40))
    const whole = await model.infer(() => model.forward(fromHost(ids, [2, 7], 'i32'))).values()
    for (const dtype of ['f32', 'bf16'] as const) {
      const cache = model.makeCache({ batch: 2, capacity: 2, dtype })
      expect(cache.bytesPerToken).toBe(2 * 2 * 2 * 8 * (dtype === 'f32' ? 4 : 2))
      const run = (tokens: number[]) =>
        model
          .infer(() => model.forward(fromHost(Int32Array.from(tokens), [2, tokens.length / 2], 'i32'), { cache }))
          .values()
      await run([...ids.subarray(0, 6), ...ids.subarray(7, 13)])
      // The second sequence drops three tokens.
      cache.truncate([6, 3])
      const out = await run([ids[6], ids[10]])
      const tolerance = dtype === 'f32' ? { relative: 1e-5, absolute: 1e-6 } : { relative: 3e-2, absolute: 3e-2 }
      assertClose('first', out.subarray(0, 40), whole.subarray(6 * 40, 7 * 40), tolerance)
      assertClose('second', out.subarray(40), whole.subarray(10 * 40, 11 * 40), tolerance)
      cache.dispose()
    }
    const cost = (name: 'deepseek-llm-7b' | 'deepseek-llm-67b') => {
      const { num_hidden_layers: layers, num_key_value_heads: groups, v_head_dim } = parseConfig(presets[name])
      return layers * 2 * groups * v_head_dim * 2
    }
    expect([cost('deepseek-llm-7b'), cost('deepseek-llm-67b')]).toEqual([491_520, 389_120])
    model.dispose()
  })

  test('learns, and a saved model opens as the same model, with the keys of Llama', async () => {
    const model = new DeepSeek({ ...small, initializer_range: 0.05 }, { seed: 5 })
    const rows = {
      tokens: Int32Array.from({ length: 24 }, (_, i) => (i * i) % 7),
      documents: new Int32Array(24),
      rows: 2,
      length: 12,
    }
    expect(model.lookahead).toBe(1)
    const parameters = namedParameters(model).map(({ parameter }) => parameter)
    const moments = parameters.map(({ shape }) => ({ m: zeros(shape), v: zeros(shape) }))
    const losses: number[] = []
    for (let step = 1; step <= 30; step++) {
      const loss = scope(() => {
        const { loss } = model.loss(rows)
        backward(loss)
        return loss.detach()
      })
      losses.push(await loss.item())
      for (const [i, parameter] of parameters.entries()) {
        const attrs = { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, step }
        const next = adamwStep(parameter, parameter.grad as Tensor, moments[i].m, moments[i].v, ones([]), attrs)
        parameter.assign(next.param)
        moments[i] = next
        parameter.zeroGrad()
      }
      expect(await model.afterStep()).toEqual({})
    }
    expect(losses[29]).toBeLessThan(losses[0] / 3)
    await model.save(folder)
    const config = JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'))
    expect(config).toMatchObject({
      architectures: ['LlamaForCausalLM'],
      model_type: 'llama',
      num_key_value_heads: 2,
      head_dim: 8,
    })
    expect(Object.keys(config).filter(key => /lora|nope|expert|topk/.test(key))).toEqual([])
    const reopened = await DeepSeek.fromPretrained(folder)
    expect(namedParameters(reopened).map(({ name }) => name)).toEqual(namedParameters(model).map(({ name }) => name))
    expect(namedParameters(reopened).map(({ name }) => name)).toContain('model.layers.1.self_attn.k_proj.weight')
    const loss = async (m: DeepSeek) => scope(() => m.loss(rows).loss).item()
    // Trained weights have f64 values on this backend, those of the file f32 values.
    expect(await loss(reopened)).toBeCloseTo(await loss(model), 7)
    reopened.dispose()
    model.dispose()
  })

  test('all problems of a configuration are reported together', () => {
    expect(() => parseConfig({ ...small, hidden_size: 'wide', num_key_value_heads: 0.5 })).toThrow(
      /2 problems[\s\S]*hidden_size[\s\S]*num_key_value_heads/,
    )
    expect(() => parseConfig({ ...small, hidden_size: 25, head_dim: null, num_key_value_heads: 3 })).toThrow(
      /2 problems[\s\S]*does not divide hidden_size = 25[\s\S]*num_key_value_heads = 3 does not divide/,
    )
    expect(() => parseConfig({ ...small, head_dim: 7 })).toThrow(/head_dim = 7 is odd/)
    expect(() => parseConfig({ ...small, rope_scaling: { type: 'linear', factor: 4 } })).toThrow(/rope type "linear"/)
  })
})
