/** @file Models with sparse attention: generation, the loss of the indexers, conversion. Numbers of transformers: transformers.test.ts. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  adamwStep,
  type Backend,
  backward,
  fromHost,
  namedParameters,
  ones,
  scope,
  setDefaultBackend,
  type Tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import {
  DeepSeek,
  type DeepSeekOptions,
  exportGguf,
  type LatentConfigInput,
  parseConfig,
  presets,
  type StageResult,
} from './index.ts'
import { expectTextsWithoutCache, prompts, scoresOf } from './test-generation.ts'
import { routeWithin, together } from './test-pieces.ts'
import { makeDraftsAgree, tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
const root = await mkdtemp(join(tmpdir(), 'moe-sparse-'))
afterAll(async () => {
  native.dispose()
  await rm(root, { recursive: true })
})

const config = {
  ...tiny,
  model_type: 'deepseek_v32',
  num_nextn_predict_layers: 2,
  index_topk: 4,
  index_n_heads: 6,
  index_head_dim: 6,
} satisfies LatentConfigInput
const rows = {
  tokens: Int32Array.from({ length: 24 }, (_, i) => (5 * i + i * i) % 40),
  documents: Int32Array.from({ length: 24 }, (_, i) => (i > 20 ? -1 : i >> 3)),
  // From the third place on, tokens do not see those before it.
  starts: Int32Array.from({ length: 24 }, (_, i) => (i % 12 < 2 ? 0 : 2)),
  rows: 2,
  length: 12,
}

const isOfIndexer = (name: string) => name.includes('.indexer.')

describe.each([
  ['the reference backend', () => reference as Backend],
  ['a backend that records', () => native as Backend],
])('generation on %s', (_, of) => {
  test.each([false, true])('continues as without a cache, speculative: %s', async speculative => {
    const backend = of()
    const { handles } = backend.stats()
    const model = new DeepSeek(config, { seed: 3, backend })
    makeDraftsAgree(model)
    await expectTextsWithoutCache(model, speculative)
    model.dispose()
    expect(backend.stats().handles).toBe(handles)
  })

  test('score is that of the forward pass', async () => {
    const model = new DeepSeek(config, { seed: 3, backend: of() })
    const { found, expected } = await scoresOf(model, prompts[2])
    assertClose('log-probabilities', found, expected, { relative: 1e-4, absolute: 1e-5 })
    model.dispose()
  })
})

test('a token in the cache takes latent, rope key and index key', () => {
  const model = new DeepSeek(config, { seed: null })
  const cache = model.makeCache({ depth: 2 })
  expect(cache.bytesPerToken).toBe(4 * (8 + 4 + 6) * 4)
  cache.dispose()
  model.dispose()
})

describe('training', () => {
  const model = (options: DeepSeekOptions = {}) => new DeepSeek(config, { seed: 3, ...options })

  const gradientsOf = async (of: DeepSeek) => {
    const all = namedParameters(of).map(async ({ name, parameter }) => {
      const values = parameter.grad && (await parameter.grad.values())
      parameter.zeroGrad()
      return [name, values] as const
    })
    return new Map(await Promise.all(all))
  }

  test('adds the mean loss of the indexers, which gives no gradient to other parameters', async () => {
    const run = async (indexerWeight: number) => {
      const own = model({ objective: { indexerWeight } })
      const numbers = scope(() => {
        const { loss, metrics } = own.loss(rows)
        const found = { loss: loss.detach(), indexer: metrics.indexer?.detach() }
        backward(loss)
        return found
      })
      const found = { loss: await numbers.loss.item(), indexer: await numbers.indexer?.item() }
      const gradients = await gradientsOf(own)
      own.dispose()
      return { ...found, gradients }
    }
    const [off, one, half] = [await run(0), await run(1), await run(0.5)]
    expect(off.indexer).toBeUndefined()
    expect(one.indexer).toBeGreaterThan(0.01)
    // Two layers and two modules.
    const total = 4 * (one.indexer as number)
    assertClose('loss', [one.loss - off.loss, half.loss - off.loss], [total, total / 2], {
      relative: 1e-4,
      absolute: 1e-5,
    })
    for (const [name, gradient] of one.gradients) {
      const expected = isOfIndexer(name) ? half.gradients.get(name)?.map(g => 2 * g) : off.gradients.get(name)
      if (isOfIndexer(name)) expect([name, off.gradients.get(name)]).toEqual([name, null])
      if (gradient === null) expect([name, expected ?? null]).toEqual([name, null])
      else assertClose(name, gradient, expected as Float32Array, tolerances.gradient)
    }
  })

  test('padding does not count', async () => {
    const own = model()
    const losses = (tokens: Int32Array) => own.infer(() => own.loss({ ...rows, tokens }).metrics.indexer)
    const other = rows.tokens.map((token, i) => (rows.documents[i] < 0 ? 39 - token : token))
    const [a, b] = [losses(rows.tokens), losses(other)]
    expect(await a.item()).toBe(await b.item())
    for (const loss of [a, b]) loss.dispose()
    own.dispose()
  })

  test('hidden reports the losses of each layer, also without gradients', async () => {
    const own = model()
    const losses = own.infer(() => {
      const found: Tensor[] = []
      own.hidden(fromHost(rows.tokens, [2, 12], 'i32'), { onIndexerLoss: loss => void found.push(loss) })
      return found
    })
    for (const loss of losses) {
      expect(loss.shape).toEqual([2, 12])
      expect(Math.max(...(await loss.values()))).toBeGreaterThan(0)
      loss.dispose()
    }
    expect(losses.length).toBe(2)
    own.dispose()
  })

  test('warm-up: attention is dense, and the indexers alone learn to rank all keys', async () => {
    const shallow = { ...config, num_hidden_layers: 1, num_nextn_predict_layers: 0 }
    const own = new DeepSeek(shallow, { seed: 3, objective: { indexerWarmup: true, biasSpeed: 0 } })
    const dense = new DeepSeek({ ...shallow, index_topk: 12 }, { seed: 3 })
    const trainingNll = async (of: DeepSeek) => {
      const tensor = scope(() => of.loss(rows).nll)
      const value = await tensor.item()
      tensor.dispose()
      return value
    }
    const hiddenStates = async (of: DeepSeek) => {
      const tensor = of.infer(() => of.hidden(fromHost(rows.tokens, [2, 12], 'i32')))
      const values = Array.from(await tensor.values())
      tensor.dispose()
      return values
    }
    const exact = await hiddenStates(dense)
    /** How far attention to the selected keys leads from attention to all keys. */
    const distance = async () => {
      const found = await hiddenStates(own)
      return found.reduce((sum, x, i) => sum + (x - exact[i]) ** 2, 0)
    }
    const before = await trainingNll(own)
    expect(before).toBeCloseTo(await trainingNll(dense), 4)
    const untrained = await distance()
    for (const { name, parameter } of namedParameters(own)) parameter.trainable = isOfIndexer(name)
    const trained = namedParameters(own).filter(({ parameter }) => parameter.trainable)
    const moments = trained.map(({ parameter }) => ({ m: zeros(parameter.shape), v: zeros(parameter.shape) }))
    const losses: number[] = []
    for (let step = 1; step <= 30; step++) {
      const loss = scope(() => {
        const { loss, metrics } = own.loss(rows)
        const value = metrics.indexer.detach()
        backward(loss)
        return value
      })
      losses.push(await loss.item())
      loss.dispose()
      for (const [i, { parameter }] of trained.entries()) {
        const attrs = { lr: 0.03, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, step }
        const { m, v } = moments[i]
        const next = adamwStep(parameter, parameter.grad as Tensor, m, v, ones([]), attrs)
        parameter.assign(next.param)
        for (const old of [m, v]) old.dispose()
        moments[i] = next
        parameter.zeroGrad()
      }
    }
    expect(losses[29]).toBeLessThan(0.5 * losses[0])
    expect(await trainingNll(own)).toBeCloseTo(before, 5)
    expect(await distance()).toBeLessThan(0.7 * untrained)
    for (const each of [own, dense]) each.dispose()
  })

  test.each(['selective', 'layers', { every: 2 }] as const)('recomputation (%j) changes no bit', async recompute => {
    const run = async (own: DeepSeek) => {
      const loss = scope(() => {
        const { loss } = own.loss(rows)
        const value = loss.detach()
        backward(loss)
        return value
      })
      const found = [await loss.item(), await gradientsOf(own)]
      loss.dispose()
      own.dispose()
      return found
    }
    expect(await run(model({ recompute }))).toEqual(await run(model()))
  })

  test.each([false, true])(
    'stages, in pieces: %s, have the loss, the metrics and the gradients of the model',
    async pieces => {
      const [whole, own] = [model(), model()]
      const expected = whole.loss(rows)
      const split = own.inStages(4)
      const losses: Tensor[] = []
      let indexer = 0
      let x: Tensor | null = null
      for (const stage of split.step([rows]).stages) {
        const part: StageResult = pieces ? await stage.inPieces(x, 0, together, routeWithin(own)) : stage.forward(x, 0)
        x = part.output ?? null
        losses.push(...part.losses)
        indexer += (await part.metrics.indexer?.item()) ?? 0
      }
      expect(split.metrics).toContain('indexer')
      const loss = losses.reduce((sum, part) => sum.add(part))
      assertClose(
        'loss',
        [await loss.item(), indexer],
        [await expected.loss.item(), await expected.metrics.indexer.item()],
      )
      backward(loss)
      backward(expected.loss)
      const [found, wanted] = [await gradientsOf(own), await gradientsOf(whole)]
      for (const [name, gradient] of wanted) {
        if (gradient === null) expect([name, found.get(name)]).toEqual([name, null])
        else assertClose(name, found.get(name) as Float32Array, gradient, tolerances.gradient)
      }
    },
  )
})

describe('conversion of a model with dense attention', () => {
  const changes = { model_type: 'deepseek_v32', index_topk: 6, index_n_heads: 4, index_head_dim: 8 } as const

  test('adds random indexers; the other weights are its own', async () => {
    const source = new DeepSeek({ ...tiny, num_nextn_predict_layers: 1 }, { seed: 7 })
    const folder = join(root, 'dense')
    await source.save(folder)
    const model = await DeepSeek.fromPretrained(folder, { config: changes })
    expect(model.config).toMatchObject(changes)
    const own = new Map(namedParameters(source).map(({ name, parameter }) => [name, parameter]))
    for (const { name, parameter } of namedParameters(model)) {
      const values = Array.from(await parameter.values())
      const from = own.get(name)
      if (from) expect([name, values]).toEqual([name, Array.from(await from.values())])
      else {
        expect(isOfIndexer(name), name).toBe(true)
        const spread = Math.sqrt(values.reduce((sum, x) => sum + x * x, 0) / values.length)
        if (!name.includes('k_norm')) expect(spread / tiny.initializer_range).toBeCloseTo(1, 0)
      }
    }
    // Saved and opened, it is the same, and its indexers must then be there.
    const again = join(root, 'sparse')
    await model.save(again)
    const opened = await DeepSeek.fromPretrained(again)
    const ids = () => fromHost(Int32Array.from(rows.tokens), [2, 12], 'i32')
    const logits = (of: DeepSeek) => of.infer(() => of.forward(ids()))
    expect(Array.from(await logits(opened).values())).toEqual(Array.from(await logits(model).values()))
    await expect(DeepSeek.fromPretrained(folder, { config: changes, weights: 'int8' })).rejects.toThrow(
      /new indexers must be trained, but quantized weights cannot be; open the model without the option weights/,
    )
    for (const each of [source, model, opened]) each.dispose()
  })
})

describe('configurations', () => {
  test('have the defaults of transformers', () => {
    const { index_topk, index_n_heads, index_head_dim, ...rest } = config
    expect(parseConfig(rest)).toMatchObject({ index_topk: 2048, index_n_heads: 64, index_head_dim: 128 })
    expect(parseConfig({ ...rest, model_type: 'glm_moe_dsa' })).toMatchObject({
      index_n_heads: 32,
      indexer_rope_interleave: true,
    })
  })

  test.each<[string, object, RegExp]>([
    [
      'an indexer in another type',
      { model_type: 'deepseek_v3' },
      /index_topk = 4, but only deepseek_v32 and glm_moe_dsa/,
    ],
    ['no compressed queries', { q_lora_rank: null }, /q_lora_rank is missing/],
    ['a small index head', { index_head_dim: 2 }, /index_head_dim = 2 is less than qk_rope_head_dim = 4/],
    [
      'the rotation of GLM in V3.2',
      { indexer_rope_interleave: true },
      /indexer_rope_interleave = true, but deepseek_v32 always/,
    ],
  ])('%s is rejected', (_, change, message) => {
    expect(() => parseConfig({ ...config, ...change })).toThrow(message)
  })

  test('GGUF has no place for indexers', async () => {
    const model = new DeepSeek(config, { seed: null })
    await expect(exportGguf(model, join(root, 'model.gguf'), { tokenizer: 'none' })).rejects.toMatchObject({
      code: 'E_UNSUPPORTED',
      problem: expect.stringContaining('sparse attention'),
    })
    model.dispose()
    expect(() => parseConfig(presets['deepseek-v3.2'])).not.toThrow()
  })
})
