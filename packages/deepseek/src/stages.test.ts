/** @file The split of a model into stages, and the loss of all stages. `@moe/parallel` tests schedules on several ranks. */
import { backward, namedParameters, Random, setDefaultBackend, type Tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { beforeEach, expect, test } from 'vitest'
import { balancedRuns } from './balanced-runs.ts'
import { countParameters, DeepSeek, type DeepSeekLoss, parseConfig, presets } from './index.ts'
import type { StageResult } from './stages.ts'
import { routeWithin, together } from './test-pieces.ts'
import { tiny } from './test-tiny.ts'

beforeEach(() => setDefaultBackend(referenceBackend()))

const newModel = () =>
  new DeepSeek({ ...tiny, num_hidden_layers: 3, first_k_dense_replace: 1, num_nextn_predict_layers: 2 })
const rows = {
  tokens: Int32Array.from({ length: 16 }, (_, i) => (5 * i + i * i) % 40),
  documents: Int32Array.from({ length: 16 }, (_, i) => (i > 12 ? -1 : i >> 3)),
  // From position 4 on, tokens do not attend to positions before it.
  starts: Int32Array.from({ length: 16 }, (_, i) => (i % 8 < 4 ? 0 : 4)),
  rows: 2,
  length: 8,
}

/** All partitions of a list of costs into runs, as the start of each. */
function* partitions(costs: number, runs: number, from = 0): Generator<number[]> {
  if (runs === 1) yield [from]
  else
    for (let next = from + 1; next <= costs - runs + 1; next++)
      for (const rest of partitions(costs, runs - 1, next)) yield [from, ...rest]
}

test('balancedRuns returns the most balanced partition', () => {
  const random = new Random(1)
  for (let trial = 0; trial < 300; trial++) {
    const costs = Array.from({ length: 1 + random.integer(8) }, () => random.integer(20))
    const runs = 1 + random.integer(costs.length)
    const imbalance = (starts: readonly number[]) => {
      const sums = starts.map((start, n) => costs.slice(start, starts[n + 1]).reduce((sum, cost) => sum + cost, 0))
      return [Math.max(...sums), sums.reduce((total, sum) => total + sum * sum, 0)]
    }
    const [best] = [...partitions(costs.length, runs)].map(imbalance).sort(([a, b], [c, d]) => a - c || b - d)
    const found = balancedRuns(costs, runs)
    expect(new Set(found).size).toBe(runs)
    expect(imbalance(found)).toEqual(best)
  }
})

const weights = Float32Array.from({ length: 16 }, (_, i) => Math.sin(i) * 2)

test.each(
  [1, 2, 4, 6].flatMap(stages =>
    ['', ' in pieces'].flatMap(pieces => [
      [stages, pieces, 'rows', rows] as const,
      [stages, pieces, 'rows with weights', { ...rows, weights }] as const,
    ]),
  ),
)(
  '%i stages%s in sequence give the loss, metrics and gradients of the model for %s',
  async (stages, pieces, _, rows) => {
    const [whole, model] = [newModel(), newModel()]
    const expected = whole.loss(rows)
    const {
      nll,
      metrics: { mtp, balance },
    } = expected as DeepSeekLoss & { metrics: Record<'mtp' | 'balance', Tensor> }
    const split = model.inStages(stages)
    let x: Tensor | null = null
    const losses: Tensor[] = []
    const metrics: Record<string, number> = {}
    const routed: number[] = []
    const route = routeWithin(model, layer => routed.push(layer))
    for (const [n, stage] of split.step([rows]).stages.entries()) {
      const part: StageResult = await (pieces === '' ? stage.forward(x, 0) : stage.inPieces(x, 0, together, route))
      expect(part.output === undefined).toBe(n === stages - 1)
      x = part.output ?? null
      losses.push(...part.losses)
      for (const [name, value] of Object.entries(part.metrics))
        metrics[name] = (metrics[name] ?? 0) + (await value.item())
    }
    expect(routed).toEqual(pieces === '' ? [] : [0, 1, 2, 3])
    const loss = losses.reduce((sum, part) => sum.add(part))
    const numbers: Record<string, number> = { loss: await loss.item(), ...metrics }
    const expectedNumbers: Record<string, number> = {
      loss: await expected.loss.item(),
      nll: (await nll.item()) / expected.count,
      mtp: await mtp.item(),
      balance: await balance.item(),
    }
    expect(Object.keys(numbers).sort()).toEqual(Object.keys(expectedNumbers).sort())
    for (const name of ['loss', 'nll', 'mtp', 'balance']) assertClose(name, [numbers[name]], [expectedNumbers[name]])
    backward(loss)
    backward(expected.loss)
    const gradients = namedParameters(model)
    for (const [i, { name, parameter }] of namedParameters(whole).entries()) {
      const { grad } = gradients[i].parameter
      expect([name, grad === null]).toEqual([gradients[i].name, parameter.grad === null])
      if (grad && parameter.grad)
        assertClose(name, await grad.values(), await parameter.grad.values(), tolerances.gradient)
    }
  },
)

test('each parameter is in one stage, except shared ones, which are in each stage that uses them', () => {
  const model = newModel()
  const { parameters } = model.inStages(6)
  const stagesOf = (name: string) =>
    parameters.flatMap((stage, n) => (stage.some(named => named.name === name) ? [n] : []))
  const all = namedParameters(model).map(({ name }) => [name, stagesOf(name)] as const)
  expect(Object.fromEntries(all.filter(([, stages]) => stages.length !== 1))).toEqual({
    'model.embed_tokens.weight': [0, 4, 5],
    'lm_head.weight': [3, 4, 5],
  })
  expect(stagesOf('model.norm.weight')).toEqual([3])
  expect(stagesOf('model.layers.2.mlp.gate.weight')).toEqual([2])
  expect(stagesOf('model.layers.4.eh_proj.weight')).toEqual([5])
})

test('costs are the active parameters per token, and the scores of attention', () => {
  const config = parseConfig({ ...presets.tiny, num_hidden_layers: 4, num_nextn_predict_layers: 0 })
  const model = new DeepSeek(config, { seed: null })
  const sum = (costs: readonly number[]) => costs.reduce((total, cost) => total + cost, 0)
  const short = sum(model.inStages(3, { sequenceLength: 0 }).costs)
  const { activeWithoutEmbedding, moe } = countParameters(config)
  // Except norms and selection biases.
  expect(Math.abs(short / activeWithoutEmbedding - 1)).toBeLessThan(0.01)
  expect(moe).toBeGreaterThan(0)
  const features = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
  expect(sum(model.inStages(3, { sequenceLength: 1000 }).costs) - short).toBe(
    4 * 500 * config.num_attention_heads * features,
  )
})

test('an MTP module costs as much as its layer, the head and eh_proj; an indexer scores half of the sequence', () => {
  const indexers = { model_type: 'deepseek_v32', index_topk: 4, index_n_heads: 2, index_head_dim: 12 } as const
  const costsOf = (model: DeepSeek, sequenceLength: number) => model.inStages(5, { sequenceLength }).costs
  const config = { ...tiny, num_hidden_layers: 3, first_k_dense_replace: 1, num_nextn_predict_layers: 1 }
  const [plain, sparse] = [{}, indexers].map(more => new DeepSeek({ ...config, ...more }, { seed: null }))
  for (const model of [plain, sparse]) {
    const [, , layer, head, module] = costsOf(model, 100)
    expect(head).toBe(model.lm_head.weight.size)
    expect(module).toBe(layer + head + 2 * tiny.hidden_size ** 2)
  }
  const growth = (model: DeepSeek) => costsOf(model, 100)[0] - costsOf(model, 0)[0]
  expect(growth(sparse) - growth(plain)).toBe((100 / 2) * 2 * 12)
})

test('a model cannot be split into more stages than parts', () => {
  const model = newModel()
  for (const stages of [0, 1.5, 7])
    expect(() => model.inStages(stages)).toThrow(
      /cannot split the model into .* stages; pass 1 to 6: the model has 3 layers, a head and 2 MTP/,
    )
})

test('invalid options are rejected, and the digest depends on all micro-batches', () => {
  const model = newModel()
  expect(() => model.inStages(2, { seqenceLength: 8 } as object)).toThrow('did you mean sequenceLength?')
  for (const sequenceLength of [-8, Number.NaN, Number.POSITIVE_INFINITY])
    expect(() => model.inStages(2, { sequenceLength })).toThrow(
      `sequenceLength = ${sequenceLength}, expected a number of positions`,
    )
  const split = model.inStages(2)
  const changed = (key: 'tokens' | 'documents', at: number) => ({ ...rows, [key]: rows[key].with(at, 30) })
  const steps = [[rows], [rows, rows], [changed('tokens', 0)], [changed('documents', 15)], [changed('tokens', 1), rows]]
  const digests = [...steps, [rows, changed('tokens', 1)]].map(step => split.step(step).digest)
  expect(new Set(digests).size).toBe(digests.length)
  expect(newModel().inStages(3).step([rows]).digest).toBe(digests[0])
  for (const digest of digests) expect(digest | 0).toBe(digest)
})
