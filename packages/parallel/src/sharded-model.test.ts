/** @file A model whose parts are on several ranks: created, evaluated, saved and resumed without the whole model on any of them. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { deferWeights, namedParameters, noGrad, scope, tensor } from '@moe/core'
import { DeepSeek, type LatentConfigInput, loadWeights } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { evaluate, type Optimizer, type TokenBatch, TokenDataset, type TrainOptions, train } from '@moe/trainer'
import { expect, test } from 'vitest'
import {
  type Communicator,
  dualPipe,
  dualPipeV,
  ExpertParallel,
  local,
  oneForwardOneBackward,
  Pipeline,
  zeroBubbleH1,
} from './index.ts'
import { backend, temporaryFolder } from './test-runs.ts'
import { digestOf, smallConfig, trainSmall } from './test-training.ts'

const document = (n: number, length: number) => Int32Array.from({ length }, (_, i) => 2 + ((i * i * n + 3 * i) % 38))
const training = TokenDataset.fromTokens([1, 2, 3].map(n => document(n, 60)))
/** An odd number of batches, whose sizes differ. */
const validation = {
  one: TokenDataset.fromTokens([document(5, 75)]),
  other: TokenDataset.fromTokens([document(7, 31)]),
}
const sizes = { sequenceLength: 8, batchSize: 2 }

type Parts = ExpertParallel<TokenBatch> | Pipeline<TokenBatch>

interface Kind {
  readonly size: number
  readonly accumulate: number
  /** Whether the loss of an evaluation has the same bits as that of the whole model. */
  readonly exact: boolean
  of(model: DeepSeek, ranks: Communicator): Parts
}

const experts = (size: number, expertParallelSize = size): Kind => ({
  ...{ size, accumulate: 1, exact: false },
  of: (model, ranks) => new ExpertParallel(model, ranks, { expertParallelSize }),
})
const kinds: Record<string, Kind> = {
  'experts on two ranks': experts(2),
  'experts on four ranks': experts(4),
  'experts on two pairs of ranks': experts(4, 2),
  'a pipeline': {
    ...{ size: 2, accumulate: 4, exact: true },
    of: (model, ranks) => new Pipeline(model, zeroBubbleH1(2, 4), ranks),
  },
  'a pipeline with one rank per layer': {
    ...{ size: 5, accumulate: 4, exact: true },
    of: (model, ranks) => new Pipeline(model, oneForwardOneBackward(5, 4), ranks),
  },
  'a pipeline with DualPipe': {
    ...{ size: 2, accumulate: 4, exact: true },
    of: (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks),
  },
  'two pipelines with DualPipeV': {
    ...{ size: 4, accumulate: 4, exact: true },
    of: (model, ranks) => new Pipeline(model, dualPipeV(2, 4), ranks),
  },
  'pipelines with sharded experts': {
    ...{ size: 4, accumulate: 2, exact: false },
    of: (model, ranks) => new Pipeline(model, zeroBubbleH1(2, 2), ranks, { expertParallelSize: 2 }),
  },
}

/** What a rank trains. */
interface Rank {
  readonly model: DeepSeek
  readonly parts: Parts
}

const trainRanks = (
  { size, accumulate, of }: Kind,
  deferred: boolean,
  optionsOf: (rank: () => Rank) => Partial<TrainOptions> = () => ({}),
) =>
  local(size, ranks => {
    let own: Rank | undefined
    const options = {
      ...{ data: { training, validation }, steps: 4, evalEvery: 2, accumulate },
      ...optionsOf(() => own as Rank),
    }
    const onRanks = (model: DeepSeek) => {
      own = { model, parts: of(model, ranks) }
      return own.parts
    }
    return trainSmall(backend, options, { onRanks, deferred })
  })

test.each(Object.entries(kinds))('evaluations and checkpoints are those of the whole model: %s', async (_, kind) => {
  const out = await temporaryFolder()
  let compared = 0
  const gathering = await trainRanks(kind, true, rank => ({
    out,
    onEvent: async event => {
      if (event.type !== 'evaluation') return
      const { model, parts } = rank()
      await parts.gather()
      const whole = await evaluate(model, validation, sizes)
      // Experts on other ranks are added up in another order.
      const near = (loss = Number.NaN) => (kind.exact ? loss : expect.closeTo(loss, 6))
      for (const name of ['one', 'other']) expect(event.sources?.[name].loss).toEqual(near(whole.sources?.[name].loss))
      expect(event.tokens).toBe(whole.tokens)
      compared++
      if (!event.final) return
      const folder = await temporaryFolder()
      await model.save(folder)
      const saved = join(out, 'checkpoints', 'step-000004', 'model')
      for (const file of ['model.safetensors', 'config.json'])
        expect(await readFile(join(saved, file))).toEqual(await readFile(join(folder, file)))
    },
  }))
  expect(compared).toBe(2 * kind.size)
  // The same bits as without deferred weights, and without looking at the whole model.
  const [plain] = await trainRanks(kind, false)
  for (const each of gathering) expect(digestOf(each)).toBe(digestOf(plain))
})

test.each(Object.entries(kinds))('ranks load their own weights of a model: %s', async (_, { size, of }) => {
  const folder = await temporaryFolder()
  const saved = new DeepSeek(smallConfig, { seed: 5, backend })
  await saved.save(folder)
  await local(size, async ranks => {
    const model = deferWeights(() => new DeepSeek(smallConfig, { seed: 1, backend }))
    const parts = of(model, ranks)
    await loadWeights(model, folder, { parameters: parts.weights })
    await parts.gather()
    const whole = new Map(namedParameters(saved).map(({ name, parameter }) => [name, parameter]))
    for (const { name, parameter } of namedParameters(model))
      expect(await parameter.data()).toEqual(await whole.get(name)?.data())
    parts.dispose()
    model.dispose()
  })
  saved.dispose()
})

test.each(Object.entries(kinds))('evaluate() of layers that share an indexer: %s', async (_, { size, exact, of }) => {
  const types = Array.from('FSSFFS', letter => (letter === 'F' ? ('full' as const) : ('shared' as const)))
  const sparse = {
    ...{ ...smallConfig, model_type: 'glm_moe_dsa' as const, num_hidden_layers: 6, first_k_dense_replace: 1 },
    ...{ index_topk: 4, index_n_heads: 4, index_head_dim: 8, indexer_types: types },
  } satisfies LatentConfigInput
  const [rows, length] = [2, 14]
  const batch = { tokens: document(3, rows * length), documents: new Int32Array(rows * length), rows, length }
  await local(size, async ranks => {
    const model = new DeepSeek(sparse, { seed: 1, backend })
    const expected = scope(() => noGrad(() => model.loss(batch, { training: false, from: 5 })))
    const nll = await expected.nll.item()
    for (const tensor of [expected.loss, expected.nll, expected.nlls, ...Object.values(expected.metrics)])
      tensor.dispose()
    const parts = of(model, ranks)
    const found = (await parts.evaluate([{ batch, from: 5 }]))[0]
    // In a pipeline, one rank has the loss.
    const losses = await gatherLosses(ranks, found?.nll ?? 0)
    const pipelines = parts instanceof Pipeline ? parts.dataShard.world : ranks.size
    expect(losses.filter(loss => loss > 0)).toEqual(Array(pipelines).fill(exact ? nll : expect.closeTo(nll, 4)))
    parts.dispose()
    model.dispose()
  })
})

async function gatherLosses(ranks: Communicator, own: number): Promise<number[]> {
  using sent = tensor([own], [1], { backend })
  using all = await ranks.allGather(sent)
  return [...(await all.values())]
}

/** An optimizer without state. */
const stateless = (): Optimizer => ({
  name: 'stateless',
  settings: () => ({}),
  step: () => {},
  entries: () => [],
  load: async () => {},
  dispose: () => {},
})

const large = {
  ...{ ...smallConfig, hidden_size: 32, moe_intermediate_size: 192, n_routed_experts: 16 },
  ...{ num_hidden_layers: 5, first_k_dense_replace: 1, num_nextn_predict_layers: 0 },
}
const bytesOf = (named: ReturnType<typeof namedParameters>) =>
  named.reduce((sum, { parameter }) => sum + 4 * parameter.size, 0)

test.each([
  ['experts', experts(4)],
  [
    'a pipeline',
    { size: 5, accumulate: 5, of: (model, ranks) => new Pipeline(model, oneForwardOneBackward(5, 5), ranks) },
  ],
] satisfies Array<[string, Omit<Kind, 'exact'>]>)(
  'no rank needs memory for the whole model to create, train, evaluate, save and resume it: %s',
  async (_, { size, accumulate, of }) => {
    const out = await temporaryFolder()
    for (const resume of [false, true]) {
      await local(size, async ranks => {
        const own = await createBackend({ threads: 1 })
        const model = deferWeights(() => new DeepSeek(large, { seed: 1, backend: own }))
        const parts = of(model, ranks)
        const [weights, whole] = [bytesOf([...parts.parameters]), bytesOf(namedParameters(model))]
        expect(own.stats().peakBytes).toBeLessThan(whole / 100)
        await train(model, {
          ...{ ...sizes, data: { training, validation }, steps: 4, evalEvery: 2, accumulate, ema: 0.9, out, resume },
          ...{ ranks: parts, optimizer: stateless, progress: false, handleSignals: false, batchSize: 1 },
        })
        const { peakBytes } = own.stats()
        expect(peakBytes).toBeLessThan(whole)
        // Without steps there are no gradients: only weights, their EMA, and the activations of an evaluation.
        if (resume) expect(peakBytes).toBeLessThan(2 * weights + 0.15 * whole)
        parts.dispose()
        model.dispose()
        own.dispose()
      })
    }
  },
)
