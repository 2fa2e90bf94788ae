/** @file Data-parallel ranks shard the optimizer state. Results are bit-identical to those with a replicated optimizer. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type NamedParameter, namedParameters } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { AdamW, Muon, type Optimizer, type Ranks, type TokenBatch, type TrainOptions } from '@moe/trainer'
import { describe, expect, test } from 'vitest'
import { type Communicator, dualPipe, dualPipeV, ExpertParallel, local, Pipeline, zeroBubbleH1 } from './index.ts'
import { rewardSmall } from './test-rewards.ts'
import { backend, temporaryFolder, tensorsIn } from './test-runs.ts'
import { digestOf, smallConfig, type Trained, trainSmall } from './test-training.ts'

type Options = Partial<TrainOptions>
type Model = Parameters<typeof trainSmall>[2]

/** Ranks without the collectives that sharding needs, so that each keeps the complete optimizer state. */
const withoutShards = (ranks: Communicator): Ranks => ({
  rank: ranks.rank,
  size: ranks.size,
  allReduce: tensors => ranks.allReduce(tensors),
  allReduceInPlace: tensors => ranks.allReduceInPlace(tensors),
  allGather: tensor => ranks.allGather(tensor),
})
const sharded = (size: number, options: Options | ((rank: number) => Options) = {}, model?: Model) =>
  local(size, ranks =>
    trainSmall(backend, { ...(typeof options === 'function' ? options(ranks.rank) : options), ranks }, model),
  )
const replicated = (size: number, options: Options = {}, model?: Model) =>
  local(size, ranks => trainSmall(backend, { ...options, ranks: withoutShards(ranks) }, model))
const numbers = (all: readonly Trained[]) =>
  all.map(({ steps, loads, weights }) => ({ steps, loads, weights: digestOf({ weights }) }))
const muon = (of: readonly NamedParameter[]) => new Muon(of, { precision: 'f32' })
/** The number of values that an optimizer has state for. */
const sizeOf = (of: readonly NamedParameter[]) =>
  of.reduce((sum, { parameter }) => sum + (parameter.trainable ? parameter.size : 0), 0)

/** `sizeOf` of the small model. */
function trainableSize(mtp = 1): number {
  const model = new DeepSeek({ ...smallConfig, num_nextn_predict_layers: mtp } as typeof smallConfig, { backend })
  const size = sizeOf(namedParameters(model))
  model.dispose()
  return size
}

test.each<[string, number, Options?, Model?]>([
  ['two ranks', 2],
  ['three ranks, two micro-batches each', 3, { accumulate: 2 }],
  ['two ranks, Muon', 2, { optimizer: muon }],
  ['five ranks, Muon, with split stacks of experts', 5, { optimizer: muon, steps: 4 }],
  ['two ranks, strong clipping', 2, { clip: 0.01 }],
  ['two ranks, no clipping', 2, { clip: Number.POSITIVE_INFINITY }],
  ['two ranks, recorded, in bf16, strong clipping', 2, { record: true, precision: 'bf16', clip: 0.01, steps: 12 }],
  [
    'three ranks, recorded, Muon, two micro-batches each',
    3,
    { record: true, optimizer: muon, accumulate: 2, steps: 12 },
  ],
  ['three ranks, without experts', 3, {}, { dense: true, mtp: 0 }],
])(
  'a sharded optimizer gives the same losses, norms and weights as a replicated one: %s',
  async (_, size, options, model) => {
    expect(numbers(await sharded(size, options, model))).toEqual(numbers(await replicated(size, options, model)))
  },
)

test('reinforcement learning gives the same bits with a sharded as with a replicated optimizer', async () => {
  const run = (ranksOf: (ranks: Communicator) => Ranks, record: boolean) =>
    local(2, ranks => rewardSmall(backend, { ranks: ranksOf(ranks), record, steps: 8 }))
  const plain = ({ weights, steps }: Trained) => ({
    weights: digestOf({ weights }),
    norms: steps.map(({ gradNorm }) => gradNorm),
  })
  const expected = (await run(withoutShards, false)).map(plain)
  for (const record of [false, true]) expect((await run(ranks => ranks, record)).map(plain)).toEqual(expected)
})

describe('a rank', () => {
  test.each([2, 3, 4])('of %i has the state of its shard only, and shards are of similar size', async size => {
    const shards: number[] = []
    await sharded(size, rank => ({
      steps: 2,
      optimizer(of) {
        shards[rank] = sizeOf(of)
        return new AdamW(of)
      },
    }))
    const whole = trainableSize()
    expect(shards.reduce((sum, shard) => sum + shard)).toBe(whole)
    // The largest matrix that is not split is 32 by 24.
    expect(Math.max(...shards)).toBeLessThanOrEqual(whole / size + 32 * 24)
  })

  test.each([false, true])('saves the memory of the other shards: recorded %s', async record => {
    const memoryWith = async (ranksOf: (ranks: Communicator) => Ranks) =>
      local(2, async ranks => {
        const own = await createBackend({ threads: 1 })
        let shard = 0
        let [after, peak] = [0, 0]
        const onEvent: TrainOptions['onEvent'] = event => {
          if (event.type !== 'step' || event.step !== 4) return
          const { bytes, peakBytes } = own.stats()
          after = bytes
          peak = peakBytes
        }
        const optimizer = (parameters: readonly NamedParameter[]) => {
          shard = sizeOf(parameters)
          return new AdamW(parameters)
        }
        // Without padding, so that all steps replay the same recording.
        const settings = { record, steps: 4, ema: 0.9, onEvent, optimizer, batchSize: 1 }
        await trainSmall(own, { ranks: ranksOf(ranks), ...settings }, { mtp: 0 })
        own.dispose()
        return { shard, after, peak }
      })
    const [shards, replicas] = [await memoryWith(ranks => ranks), await memoryWith(withoutShards)]
    for (const [rank, { shard, after, peak }] of shards.entries()) {
      // Two moments and the EMA, in f32.
      const saved = 3 * 4 * (replicas[rank].shard - shard)
      expect(saved).toBeGreaterThan(0)
      if (!record) expect(replicas[rank].after - after).toBe(saved)
      expect(replicas[rank].peak - peak).toBeGreaterThan(0.5 * saved)
    }
  })

  test.each([false, true])(
    'may have an empty shard if there are more ranks than parameters: recorded %s',
    async record => {
      const sizes: number[] = []
      const model = { dense: true, mtp: 0 }
      const options = { steps: 4, batchSize: 1, record }
      const runs = await sharded(
        40,
        rank => ({
          ...options,
          optimizer(of) {
            sizes[rank] = of.length
            return muon(of)
          },
        }),
        model,
      )
      expect(Math.min(...sizes)).toBe(0)
      expect(numbers(runs)).toEqual(numbers(await replicated(40, { ...options, optimizer: muon }, model)))
    },
  )
})

describe.each<
  [string, number, number, (model: DeepSeek, ranks: Communicator) => Pipeline<TokenBatch> | ExpertParallel<TokenBatch>]
>([
  ['expert parallelism', 2, 2, (model, ranks) => new ExpertParallel(model, ranks)],
  [
    'expert parallelism in two pairs of ranks',
    4,
    1,
    (model, ranks) => new ExpertParallel(model, ranks, { expertParallelSize: 2 }),
  ],
  ['two pipelines', 4, 2, (model, ranks) => new Pipeline(model, zeroBubbleH1(2, 2), ranks)],
  ['a pipeline with stages on two ranks', 2, 4, (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks)],
  ['two pipelines with stages on two ranks', 4, 4, (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks)],
  [
    'four pipelines, with experts sharded over pairs of them',
    4,
    1,
    (model, ranks) => new Pipeline(model, dualPipeV(1, 2), ranks, { expertParallelSize: 2 }),
  ],
  [
    'four pipelines with stages on two ranks, with experts sharded over pairs of them',
    8,
    4,
    (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks, { expertParallelSize: 2 }),
  ],
])('the state of parameters that several ranks have is sharded: %s', (_, size, accumulate, make) => {
  const run = (shard: boolean, options: (rank: number) => Options = () => ({}), model: Model = {}) =>
    local(size, ranks =>
      trainSmall(
        backend,
        { ...options(ranks.rank), ...(accumulate > 1 && { accumulate }), batchSize: 1 },
        {
          ...model,
          onRanks(trainee) {
            const parallel = make(trainee, ranks)
            return shard ? parallel : Object.assign(parallel, { shardOptimizer: undefined })
          },
        },
      ),
    )

  test.each<[string, Options, Model?]>([
    ['AdamW', { clip: 0.05 }],
    ['Muon', { optimizer: muon, steps: 4 }, { mtp: 0 }],
  ])('with the same bits as without sharding, %s', async (_, options, model) => {
    expect(numbers(await run(true, () => options, model))).toEqual(numbers(await run(false, () => options, model)))
  })

  test('with each state on exactly one rank', async () => {
    const names: string[][] = []
    const sizes: number[] = []
    await run(
      true,
      rank => ({
        steps: 2,
        optimizer(of) {
          names[rank] = of.flatMap(({ name, parameter }) => (parameter.trainable ? [name] : []))
          sizes[rank] = sizeOf(of)
          return new AdamW(of)
        },
      }),
      { mtp: 0 },
    )
    expect(sizes.reduce((sum, of) => sum + of)).toBe(trainableSize(0))
    expect(names.every(of => of.length > 0)).toBe(true)
  })

  test('and runs resume from its checkpoints, with or without sharding', async () => {
    const out = await temporaryFolder()
    const options = { schedule: () => 1, out, checkpointEvery: 3, keepCheckpoints: 5 }
    const straight = await run(true, () => options)
    for (const shard of [true, false]) {
      const resumed = await run(shard, () => ({ ...options, resume: join(out, 'checkpoints', 'step-000003') }))
      expect(resumed.map(digestOf)).toEqual(straight.map(digestOf))
    }
  })
})

test('with expert parallelism, too, ranks may have an empty shard', async () => {
  const sizes: number[] = []
  const options = (rank: number): Options => ({
    steps: 1,
    batchSize: 1,
    optimizer(of) {
      sizes[rank] = sizeOf(of)
      return new AdamW(of)
    },
  })
  const runs = await local(80, ranks =>
    trainSmall(backend, options(ranks.rank), {
      mtp: 0,
      onRanks: model => new ExpertParallel(model, ranks, { expertParallelSize: 2 }),
    }),
  )
  expect(Math.min(...sizes)).toBe(0)
  expect(new Set(runs.map(digestOf)).size).toBe(1)
})

describe('a checkpoint', () => {
  const shared = { schedule: () => 1, batchSize: 1, checkpointEvery: 3, keepCheckpoints: 5, ema: 0.8 }
  const model = { mtp: 0 }
  const runs: Record<string, (options: Options) => Promise<Trained>> = {
    'one rank': options => trainSmall(backend, { ...shared, accumulate: 6, ...options }, model),
    'two ranks': async options => (await sharded(2, { ...shared, accumulate: 3, ...options }, model))[0],
    'two ranks, replicated': async options => (await replicated(2, { ...shared, accumulate: 3, ...options }, model))[0],
    'three ranks, recorded': async options =>
      (await sharded(3, { ...shared, accumulate: 2, record: true, ...options }, model))[0],
    'six ranks': async options => (await sharded(6, { ...shared, ...options }, model))[0],
  }

  test.each(['AdamW', 'Muon'])('resumes with any number of ranks, sharded or replicated: %s', async name => {
    const optimizer = name === 'Muon' ? { optimizer: muon } : {}
    const folders: Record<string, string> = {}
    const ends: Record<string, Trained> = {}
    for (const [from, train] of Object.entries(runs)) {
      folders[from] = await temporaryFolder()
      ends[from] = await train({ ...optimizer, out: folders[from] })
    }
    const file = (run: string) => join(folders[run], 'checkpoints', 'step-000003', 'optimizer.safetensors')
    const [tensors, state] = [await tensorsIn(file('one rank')), await readFile(file('two ranks, replicated'))]
    for (const from of Object.keys(runs)) expect(await tensorsIn(file(from))).toEqual(tensors)
    const emaOf = (run: string, step: number) =>
      readFile(join(folders[run], 'checkpoints', `step-00000${step}`, 'ema', 'model.safetensors'))
    const finalEma = Object.fromEntries(
      await Promise.all(Object.keys(runs).map(async from => [from, await emaOf(from, 8)] as const)),
    )
    expect(finalEma['two ranks'].equals(finalEma['two ranks, replicated'])).toBe(true)
    // Gradients are added in the same order, so that the states are identical.
    if (name === 'AdamW') expect((await readFile(file('two ranks'))).equals(state)).toBe(true)
    expect(digestOf(ends['two ranks'])).toBe(digestOf(ends['two ranks, replicated']))
    for (const [to, train] of Object.entries(runs)) {
      for (const from of ['two ranks', to]) {
        const resume = join(folders[from], 'checkpoints', 'step-000003')
        const resumed = await train({ ...optimizer, out: folders[from], resume })
        expect(resumed.steps.map(({ step }) => step)).toEqual([4, 5, 6, 7, 8])
        if (from === to || to === 'two ranks, replicated') {
          expect(digestOf(resumed)).toBe(digestOf(ends[from]))
          expect((await emaOf(from, 8)).equals(finalEma[from])).toBe(true)
        }
        for (const [i, { loss }] of resumed.steps.entries())
          expect(loss).toBeCloseTo(ends['one rank'].steps[3 + i].loss, 3)
      }
    }
  })

  test('of two sharded ranks equals that of one rank with two micro-batches bit for bit', async () => {
    const options = { schedule: () => 1, ema: 0.8 }
    const [out, ofOne] = [await temporaryFolder(), await temporaryFolder()]
    const [first] = await sharded(2, { ...options, out }, model)
    const one = await trainSmall(backend, { ...options, accumulate: 2, out: ofOne }, model)
    expect(digestOf(first)).toBe(digestOf(one))
    for (const file of ['optimizer.safetensors', 'ema/model.safetensors']) {
      const [own, like] = [out, ofOne].map(of => join(of, 'checkpoints', 'step-000008', file))
      expect((await readFile(own)).equals(await readFile(like))).toBe(true)
    }
  })
})

test.each<[string, number, Options]>([
  ['two ranks', 2, {}],
  ['two ranks, recorded', 2, { record: true, precision: 'bf16' }],
  ['seven ranks, with split embedding tables', 7, {}],
  ['seven ranks, recorded', 7, { record: true }],
  ['40 ranks, some with an empty shard', 40, {}],
])('a sharded EMA of the weights equals a replicated one: %s', async (_, size, options) => {
  const settings = { ...options, batchSize: 1, steps: 5, checkpointEvery: 3, ema: 0.8 }
  const model = { dense: true, mtp: 0 }
  const [shards, replicas] = [await temporaryFolder(), await temporaryFolder()]
  await sharded(size, { ...settings, out: shards }, model)
  await replicated(size, { ...settings, out: replicas }, model)
  for (const step of [3, 5]) {
    const [sharded, replicated] = [shards, replicas].map(out =>
      readFile(join(out, 'checkpoints', `step-00000${step}`, 'ema', 'model.safetensors')),
    )
    expect((await sharded).equals(await replicated)).toBe(true)
  }
})

test('an optimizer whose entries do not name their parameters is replicated on every rank', async () => {
  const sizes: number[][] = [[], []]
  const custom = (of: readonly NamedParameter[]): Optimizer => {
    const adamw = new AdamW(of)
    return {
      name: 'custom',
      settings: parameters => adamw.settings(parameters),
      step: (lr, gradScale) => adamw.step(lr, gradScale),
      load: (source, steps) => adamw.load(source, steps),
      dispose: () => adamw.dispose(),
      entries: () => adamw.entries().map(({ parameter: _, ...entry }) => entry),
    }
  }
  const options = { schedule: () => 1, checkpointEvery: 3, keepCheckpoints: 5 }
  const out = await temporaryFolder()
  const own = (rank: number) => ({
    ...options,
    out,
    optimizer(of: readonly NamedParameter[]) {
      sizes[rank].push(sizeOf(of))
      return custom(of)
    },
  })
  const [first, second] = await sharded(2, own)
  expect(sizes.map(ofRank => ofRank.at(-1))).toEqual([trainableSize(), trainableSize()])
  expect(digestOf(second)).toBe(digestOf(first))
  expect(digestOf(first)).toBe(digestOf((await sharded(2, options))[0]))
  const resumed = await sharded(2, rank => ({ ...own(rank), resume: join(out, 'checkpoints', 'step-000003') }))
  expect(digestOf(resumed[0])).toBe(digestOf(first))
})

test('Muon rejects a parameter of which the rank has only some rows', async () => {
  const all = (of: readonly NamedParameter[]) => new Muon(of, { filter: ({ parameter }) => parameter.rank === 2 })
  await expect(sharded(40, { optimizer: all }, { mtp: 0 })).rejects.toThrow(
    /Muon: filter selects (model\.embed_tokens|lm_head)\.weight, but this rank has only some of its rows; exclude embedding tables/,
  )
})

/** A model whose head has a gradient that is not finite in the third step. */
class Overflowing extends DeepSeek {
  override loss(...args: Parameters<DeepSeek['loss']>) {
    const output = super.loss(...args)
    const large = this.step < 2 ? 0 : 3e38
    return { ...output, loss: output.loss.add(this.lm_head.weight.mul(large).mul(large).sum()) }
  }
}

test('all ranks name the same parameter with a gradient that is not finite, whichever rank has its state', async () => {
  const messages = await local(2, ranks =>
    trainSmall(backend, { ranks }, { kind: Overflowing, mtp: 0 }).then(
      () => 'no error',
      error => `${error.code} ${error.message}`,
    ),
  )
  expect(messages[0]).toMatch(
    /^E_NAN train: step 3 has .*, first not finite in the gradient of lm_head\.weight: \d+ of \d+/,
  )
  expect(messages[1]).toBe(messages[0])
})
