/** @file Layers that attend to the keys that the indexer of an earlier layer has selected. Numbers of transformers: transformers.test.ts. */
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Backend, backward, fromHost, namedParameters, scope, setDefaultBackend, type Tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import {
  countParameters,
  DeepSeek,
  type DeepSeekOptions,
  hfConfig,
  type LatentConfigInput,
  parseConfig,
  type StageResult,
} from './index.ts'
import { expectTextsWithoutCache } from './test-generation.ts'
import { routeWithin, together } from './test-pieces.ts'
import { makeDraftsAgree, tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
const root = await mkdtemp(join(tmpdir(), 'moe-shared-indexers-'))
afterAll(async () => {
  native.dispose()
  await rm(root, { recursive: true })
})

/** Two groups of layers, and a layer of its own between them. */
const pattern = 'FSSFFS'
const types = Array.from(pattern, letter => (letter === 'F' ? ('full' as const) : ('shared' as const)))
const config = {
  ...tiny,
  model_type: 'glm_moe_dsa',
  num_hidden_layers: 6,
  num_nextn_predict_layers: 2,
  index_topk: 4,
  index_n_heads: 6,
  index_head_dim: 6,
  indexer_types: types,
} satisfies LatentConfigInput
const rows = {
  tokens: Int32Array.from({ length: 24 }, (_, i) => (5 * i + i * i) % 40),
  documents: Int32Array.from({ length: 24 }, (_, i) => (i > 20 ? -1 : i >> 3)),
  // From the third place on, tokens do not see those before it.
  starts: Int32Array.from({ length: 24 }, (_, i) => (i % 12 < 2 ? 0 : 2)),
  rows: 2,
  length: 12,
}

describe.each([
  ['the reference backend', () => reference as Backend],
  ['a backend that records', () => native as Backend],
])('on %s', (_, of) => {
  test.each([false, true])('generation continues as without a cache, speculative: %s', async speculative => {
    const backend = of()
    const { handles } = backend.stats()
    const model = new DeepSeek(config, { seed: 3, backend })
    makeDraftsAgree(model)
    await expectTextsWithoutCache(model, speculative)
    model.dispose()
    expect(backend.stats().handles).toBe(handles)
  })

  test('hidden states over a cache are those of the forward pass', async () => {
    const model = new DeepSeek(config, { seed: 3, backend: of() })
    const ids = (from: number, to: number) => fromHost(rows.tokens.slice(from, to), [1, to - from], 'i32', of())
    const whole = model.infer(() => model.hidden(ids(0, 20)))
    const expected = await whole.values()
    whole.dispose()
    for (const cache of [model.makeCache({ capacity: 2 }), model.makePagedCache({ tokens: 32, pageSize: 2 })]) {
      const sequence = 'start' in cache ? cache.start([]) : undefined
      let from = 0
      for (const time of [3, 10, 1, 1, 5]) {
        if ('start' in cache && sequence) cache.reserve(sequence, from + time)
        const view = 'start' in cache && sequence ? cache.batch([sequence]) : cache
        const out = model.infer(() => model.hidden(ids(from, from + time), { cache: view as never }))
        assertClose(`from ${from}`, await out.values(), expected.subarray(from * 24, (from + time) * 24), {
          relative: 1e-4,
          absolute: 1e-5,
        })
        out.dispose()
        from += time
      }
      cache.dispose()
    }
    model.dispose()
  })
})

test('only layers with an indexer store its keys', () => {
  const model = new DeepSeek(config, { seed: null })
  const cache = model.makeCache({ depth: 1 })
  // Latent and rope key in seven layers, the key of an indexer in four: three of the model, and that of the module.
  expect(cache.bytesPerToken).toBe((7 * (8 + 4) + 4 * 6) * 4)
  const paged = model.makePagedCache({ depth: 1, tokens: 64 })
  expect(paged.bytes).toBe(64 * cache.bytesPerToken)
  expect(() => cache.rows(1, 'index')).toThrow(/stores no keys of an indexer for layer 1/)
  for (const each of [cache, paged, model]) each.dispose()
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

  test('each indexer has a loss and learns from it', async () => {
    const own = model()
    const losses: Tensor[] = []
    const onIndexerLoss = (loss: Tensor) => void losses.push(loss)
    scope(() => void own.infer(() => own.hidden(fromHost(rows.tokens, [2, 12], 'i32'), { onIndexerLoss })))
    expect(losses.length).toBe(3)
    scope(() => backward(own.loss(rows).loss))
    const indexers = [...(await gradientsOf(own))].filter(([name]) => name.includes('.indexer.wq_b'))
    expect(indexers.map(([name]) => name.split('.')[2])).toEqual(['0', '3', '4', '6', '7'])
    for (const [name, gradient] of indexers) expect(Math.max(...(gradient ?? [0])), name).toBeGreaterThan(0)
    own.dispose()
  })

  test('the metric is the mean over the indexers', async () => {
    const run = async (indexerWeight: number) => {
      const own = model({ objective: { indexerWeight } })
      const numbers = own.infer(() => {
        const { loss, metrics } = own.loss(rows)
        return { loss, indexer: metrics.indexer }
      })
      const found = { loss: await numbers.loss.item(), indexer: (await numbers.indexer?.item()) ?? 0 }
      own.dispose()
      return found
    }
    const [off, on] = [await run(0), await run(1)]
    assertClose('loss', [on.loss - off.loss], [5 * on.indexer], { relative: 1e-4, absolute: 1e-5 })
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

  test.each([
    [1, false],
    [4, false],
    [6, false],
    [1, true],
    [6, true],
  ])('%i stages, in pieces: %s, have the loss, the metrics and the gradients of the model', async (stages, pieces) => {
    const [whole, own] = [model(), model({ recompute: 'layers' })]
    const expected = whole.loss(rows)
    const split = own.inStages(stages)
    const losses: Tensor[] = []
    let indexer = 0
    let x: Tensor | null = null
    for (const stage of split.step([rows]).stages) {
      const part: StageResult = pieces ? await stage.inPieces(x, 0, together, routeWithin(own)) : stage.forward(x, 0)
      x = part.output ?? null
      losses.push(...part.losses)
      indexer += (await part.metrics.indexer?.item()) ?? 0
    }
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
  })

  test('stages begin at layers with indexers', () => {
    const own = model()
    const layersOf = (stages: number) =>
      own.inStages(stages).parameters.map(named => {
        const layers = named.flatMap(({ name }) => /^model\.layers\.(\d+)\./.exec(name)?.[1] ?? [])
        return [...new Set(layers)].join(' ')
      })
    // Three groups, the head, two modules.
    expect(layersOf(6)).toEqual(['0 1 2', '3', '4 5', '', '6', '7'])
    // A layer that shares an indexer costs less by its weights and its scores.
    const [, alone, two] = own.inStages(6, { sequenceLength: 100 }).costs
    expect(alone - (two - alone)).toBe(countParameters(own.config).indexer + (6 * 6 * 100) / 2)
    expect(() => own.inStages(7)).toThrow(
      /cannot split the model into 7 stages; pass 1 to 6: .* 6 layers, a head and 2 MTP modules, and layers that share an indexer stay in one stage/,
    )
    own.dispose()
  })
})

describe('checkpoints and configurations', () => {
  test('a saved model opens again, and its config.json has both notations', async () => {
    const own = new DeepSeek(config, { seed: 3 })
    const folder = join(root, 'saved')
    await own.save(folder)
    const json = JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'))
    expect(json).toMatchObject({ indexer_types: types, index_topk_pattern: pattern })
    const opened = await DeepSeek.fromPretrained(folder)
    expect(opened.config).toEqual(own.config)
    const logits = (of: DeepSeek) => of.infer(() => of.forward(fromHost(rows.tokens, [2, 12], 'i32')))
    expect(await logits(opened).values()).toEqual(await logits(own).values())
    for (const each of [own, opened]) each.dispose()
  })

  test('indexers of layers that are changed to share another are not loaded', async () => {
    const all = new DeepSeek({ ...config, indexer_types: null }, { seed: 3 })
    const folder = join(root, 'all')
    await all.save(folder)
    expect(JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'))).not.toHaveProperty('indexer_types')
    const fewer = await DeepSeek.fromPretrained(folder, { config: { indexer_types: types } })
    const own = new Map(namedParameters(all).map(({ name, parameter }) => [name, parameter]))
    for (const { name, parameter } of namedParameters(fewer)) {
      expect([name, await parameter.values()]).toEqual([name, await own.get(name)?.values()])
    }
    expect(fewer.indexedLayers).toEqual([0, 3, 4, 6, 7])
    for (const each of [all, fewer]) each.dispose()
  })

  test('parameters are counted without the indexers that layers do not have', () => {
    const own = new DeepSeek(config, { seed: null })
    const sizes = (beyond: boolean) =>
      namedParameters(own)
        .filter(({ name }) => /^model\.layers\.[67]\./.test(name) === beyond)
        .reduce((sum, { parameter }) => sum + parameter.size, 0)
    const { total, mtp } = countParameters(own.config)
    expect([total, mtp]).toEqual([sizes(false), sizes(true)])
    own.dispose()
  })

  const { indexer_types: _, ...others } = config

  test.each<[string, object, string]>([
    ['a list', { indexer_types: types }, pattern],
    ['letters', { index_topk_pattern: pattern }, pattern],
    ['a list and the same letters', { indexer_types: types, index_topk_pattern: pattern }, pattern],
    ['a list that precedes the schedule', { indexer_types: types, index_topk_freq: 6 }, pattern],
    // These are what GlmMoeDsaConfig of transformers computes.
    ['a number of layers per indexer', { index_topk_freq: 3 }, 'FFSSFS'],
    ["a number and GLM-5.2's offset", { index_topk_freq: 4, index_skip_topk_offset: 3 }, 'FFFSSS'],
    ['a number and no offset', { index_topk_freq: 2, index_skip_topk_offset: 1 }, 'FSFSFS'],
  ])('layers share indexers by %s', (_, settings, expected) => {
    const own = parseConfig({ ...others, ...settings })
    expect(own.indexer_types?.map(type => (type === 'full' ? 'F' : 'S')).join('')).toBe(expected)
    expect(parseConfig(hfConfig(own))).toEqual(own)
  })

  test.each<[string, object]>([
    ['by default', {}],
    ['by one layer per indexer', { index_topk_freq: 1, index_skip_topk_offset: 3, index_topk_pattern: null }],
    ['by a list', { indexer_types: types.map(() => 'full') }],
  ])('no layer shares an indexer %s', (_, settings) => {
    expect(parseConfig({ ...others, ...settings })).not.toHaveProperty('indexer_types')
  })

  test.each<[string, object, RegExp]>([
    [
      'another number of entries',
      { indexer_types: types.slice(1) },
      /indexer_types has 5 entries, but num_hidden_layers = 6/,
    ],
    ['another number of letters', { index_topk_pattern: 'FSSFFSS' }, /index_topk_pattern has 7 entries/],
    ['other letters', { index_topk_pattern: 'FSSFFX' }, /index_topk_pattern/],
    ['other words', { indexer_types: ['full', 'none'] }, /indexer_types\.1/],
    ['a contradiction', { indexer_types: types, index_topk_pattern: 'FFFFFF' }, /index_topk_pattern = FFFFFF disagree/],
    ['no indexer in the first layer', { index_topk_pattern: 'SSFFFF' }, /the first layer has no indexer before it/],
    [
      'the first layer by schedule',
      { index_topk_freq: 3, index_skip_topk_offset: 0 },
      /the first layer has no indexer/,
    ],
    ['another type', { model_type: 'deepseek_v32', indexer_types: types }, /only glm_moe_dsa has such layers/],
  ])('%s is rejected', (_, settings, message) => {
    expect(() => parseConfig({ ...others, ...settings })).toThrow(message)
  })
})
