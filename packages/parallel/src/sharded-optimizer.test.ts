/** @file Ranks that share rows out share the optimizer out, too: each keeps the state of its part. Nothing else is different, to the bit. */
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

/** Ranks that can do what ranks could before: every one has all of the optimizer. */
const apart = (ranks: Communicator): Ranks => ({
  rank: ranks.rank,
  size: ranks.size,
  allReduce: tensors => ranks.allReduce(tensors),
  allReduceInPlace: tensors => ranks.allReduceInPlace(tensors),
  allGather: tensor => ranks.allGather(tensor),
})
const sharing = (size: number, options: Options | ((rank: number) => Options) = {}, model?: Model) =>
  local(size, ranks =>
    trainSmall(backend, { ...(typeof options === 'function' ? options(ranks.rank) : options), ranks }, model),
  )
const replicated = (size: number, options: Options = {}, model?: Model) =>
  local(size, ranks => trainSmall(backend, { ...options, ranks: apart(ranks) }, model))
const numbers = (all: readonly Trained[]) =>
  all.map(({ steps, loads, weights }) => ({ steps, loads, weights: digestOf({ weights }) }))
const muon = (of: readonly NamedParameter[]) => new Muon(of, { precision: 'f32' })
/** Numbers that an optimizer has state for. */
const sizeOf = (of: readonly NamedParameter[]) =>
  of.reduce((sum, { parameter }) => sum + (parameter.trainable ? parameter.size : 0), 0)

/** Of a small model. */
function trained(mtp = 1): number {
  const model = new DeepSeek({ ...smallConfig, num_nextn_predict_layers: mtp } as typeof smallConfig, { backend })
  const size = sizeOf(namedParameters(model))
  model.dispose()
  return size
}

test.each<[string, number, Options?, Model?]>([
  ['two', 2],
  ['three, of two micro-batches', 3, { accumulate: 2 }],
  ['two, Muon', 2, { optimizer: muon }],
  ['five, Muon, whose stacks of experts are cut', 5, { optimizer: muon, steps: 4 }],
  ['two, clipped hard', 2, { clip: 0.01 }],
  ['two, not clipped', 2, { clip: Number.POSITIVE_INFINITY }],
  ['two, recorded, in bf16, clipped hard', 2, { record: true, precision: 'bf16', clip: 0.01, steps: 12 }],
  ['three, recorded, Muon, of two micro-batches', 3, { record: true, optimizer: muon, accumulate: 2, steps: 12 }],
  ['three, dense', 3, {}, { dense: true, mtp: 0 }],
])('losses, norms and weights are those of ranks that have all of it each: %s', async (_, size, options, model) => {
  expect(numbers(await sharing(size, options, model))).toEqual(numbers(await replicated(size, options, model)))
})

test('rewards are learned with the same bits', async () => {
  const run = (of: (ranks: Communicator) => Ranks, record: boolean) =>
    local(2, ranks => rewardSmall(backend, { ranks: of(ranks), record, steps: 8 }))
  const plain = ({ weights, steps }: Trained) => ({
    weights: digestOf({ weights }),
    norms: steps.map(({ gradNorm }) => gradNorm),
  })
  const expected = (await run(apart, false)).map(plain)
  for (const record of [false, true]) expect((await run(ranks => ranks, record)).map(plain)).toEqual(expected)
})

describe('each rank', () => {
  test.each([2, 3, 4])('of %i has the state of its shard, and these are about as large', async size => {
    const shards: number[] = []
    await sharing(size, rank => ({
      steps: 2,
      optimizer(of) {
        shards[rank] = sizeOf(of)
        return new AdamW(of)
      },
    }))
    const whole = trained()
    expect(shards.reduce((sum, shard) => sum + shard)).toBe(whole)
    // The largest matrix that is not cut is one of 32 by 24.
    expect(Math.max(...shards)).toBeLessThanOrEqual(whole / size + 32 * 24)
  })

  test.each([false, true])('has less memory taken, by just that: recorded %s', async record => {
    const bytes = async (of: (ranks: Communicator) => Ranks) =>
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
        // Without padding: all steps are of one kind.
        const settings = { record, steps: 4, ema: 0.9, onEvent, optimizer, batchSize: 1 }
        await trainSmall(own, { ranks: of(ranks), ...settings }, { mtp: 0 })
        own.dispose()
        return { shard, after, peak }
      })
    const [shared, all] = [await bytes(ranks => ranks), await bytes(apart)]
    for (const [rank, { shard, after, peak }] of shared.entries()) {
      // Two moments and the average.
      const saved = 3 * 4 * (all[rank].shard - shard)
      expect(saved).toBeGreaterThan(0)
      if (!record) expect(all[rank].after - after).toBe(saved)
      expect(all[rank].peak - peak).toBeGreaterThan(0.5 * saved)
    }
  })

  test.each([false, true])(
    'may have nothing, as there are more than parameters can be dealt to: recorded %s',
    async record => {
      const sizes: number[] = []
      const model = { dense: true, mtp: 0 }
      const options = { steps: 4, batchSize: 1, record }
      const runs = await sharing(
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
  ['experts on each rank', 2, 2, (model, ranks) => new ExpertParallel(model, ranks)],
  [
    'two times experts on two ranks',
    4,
    1,
    (model, ranks) => new ExpertParallel(model, ranks, { expertParallelSize: 2 }),
  ],
  ['two pipelines', 4, 2, (model, ranks) => new Pipeline(model, zeroBubbleH1(2, 2), ranks)],
  ['a pipeline with stages on two ranks', 2, 4, (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks)],
  ['two pipelines with stages on two ranks', 4, 4, (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks)],
  [
    'four pipelines, of which two share experts out',
    4,
    1,
    (model, ranks) => new Pipeline(model, dualPipeV(1, 2), ranks, { expertParallelSize: 2 }),
  ],
  [
    'four pipelines with stages on two ranks, of which two share experts out',
    8,
    4,
    (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks, { expertParallelSize: 2 }),
  ],
])('what several ranks have of a model in parts is shared out: %s', (_, size, accumulate, make) => {
  const run = (shared: boolean, options: (rank: number) => Options = () => ({}), model: Model = {}) =>
    local(size, ranks =>
      trainSmall(
        backend,
        { ...options(ranks.rank), ...(accumulate > 1 && { accumulate }), batchSize: 1 },
        {
          ...model,
          onRanks(made) {
            const parts = make(made, ranks)
            return shared ? parts : Object.assign(parts, { shardOptimizer: undefined })
          },
        },
      ),
    )

  test.each<[string, Options, Model?]>([
    ['AdamW', { clip: 0.05 }],
    ['Muon', { optimizer: muon, steps: 4 }, { mtp: 0 }],
  ])('with the same bits, %s', async (_, options, model) => {
    expect(numbers(await run(true, () => options, model))).toEqual(numbers(await run(false, () => options, model)))
  })

  test('each state on one rank', async () => {
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
    expect(sizes.reduce((sum, of) => sum + of)).toBe(trained(0))
    expect(names.every(of => of.length > 0)).toBe(true)
  })

  test('goes on from what was saved', async () => {
    const out = await temporaryFolder()
    const options = { schedule: () => 1, out, checkpointEvery: 3, keepCheckpoints: 5 }
    const straight = await run(true, () => options)
    for (const shared of [true, false]) {
      const resumed = await run(shared, () => ({ ...options, resume: join(out, 'checkpoints', 'step-000003') }))
      expect(resumed.map(digestOf)).toEqual(straight.map(digestOf))
    }
  })
})

test('some of many ranks with experts may train nothing', async () => {
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
  const six = { schedule: () => 1, batchSize: 1, checkpointEvery: 3, keepCheckpoints: 5, ema: 0.8 }
  const model = { mtp: 0 }
  const ways: Record<string, (options: Options) => Promise<Trained>> = {
    'one rank': options => trainSmall(backend, { ...six, accumulate: 6, ...options }, model),
    two: async options => (await sharing(2, { ...six, accumulate: 3, ...options }, model))[0],
    'two that have all of it': async options => (await replicated(2, { ...six, accumulate: 3, ...options }, model))[0],
    'three, recorded': async options =>
      (await sharing(3, { ...six, accumulate: 2, record: true, ...options }, model))[0],
    six: async options => (await sharing(6, { ...six, ...options }, model))[0],
  }

  test.each(['AdamW', 'Muon'])('of any ranks goes on with any others, %s', async name => {
    const optimizer = name === 'Muon' ? { optimizer: muon } : {}
    const folders: Record<string, string> = {}
    const ends: Record<string, Trained> = {}
    for (const [from, train] of Object.entries(ways)) {
      folders[from] = await temporaryFolder()
      ends[from] = await train({ ...optimizer, out: folders[from] })
    }
    const file = (of: string) => join(folders[of], 'checkpoints', 'step-000003', 'optimizer.safetensors')
    const [like, state] = [await tensorsIn(file('one rank')), await readFile(file('two that have all of it'))]
    for (const from of Object.keys(ways)) expect(await tensorsIn(file(from))).toEqual(like)
    const averages = (of: string, step: number) =>
      readFile(join(folders[of], 'checkpoints', `step-00000${step}`, 'ema', 'model.safetensors'))
    const averagesOf = Object.fromEntries(
      await Promise.all(Object.keys(ways).map(async from => [from, await averages(from, 8)] as const)),
    )
    expect(averagesOf['two'].equals(averagesOf['two that have all of it'])).toBe(true)
    // Where the order of additions is the same, so is everything.
    if (name === 'AdamW') expect((await readFile(file('two'))).equals(state)).toBe(true)
    expect(digestOf(ends['two'])).toBe(digestOf(ends['two that have all of it']))
    for (const [to, train] of Object.entries(ways)) {
      for (const from of ['two', to]) {
        const resume = join(folders[from], 'checkpoints', 'step-000003')
        const resumed = await train({ ...optimizer, out: folders[from], resume })
        expect(resumed.steps.map(({ step }) => step)).toEqual([4, 5, 6, 7, 8])
        if (from === to || to === 'two that have all of it') {
          expect(digestOf(resumed)).toBe(digestOf(ends[from]))
          expect((await averages(from, 8)).equals(averagesOf[from])).toBe(true)
        }
        for (const [i, { loss }] of resumed.steps.entries())
          expect(loss).toBeCloseTo(ends['one rank'].steps[3 + i].loss, 3)
      }
    }
  })

  test('with a shard of two micro-batches is that of one rank, bit for bit', async () => {
    const options = { schedule: () => 1, ema: 0.8 }
    const [out, ofOne] = [await temporaryFolder(), await temporaryFolder()]
    const [first] = await sharing(2, { ...options, out }, model)
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
  ['seven ranks, which split token tables', 7, {}],
  ['seven ranks, recorded', 7, { record: true }],
  ['40 ranks, some of which average nothing', 40, {}],
])('averaged weights are those of ranks that average the whole model: %s', async (_, size, options) => {
  const settings = { ...options, batchSize: 1, steps: 5, checkpointEvery: 3, ema: 0.8 }
  const model = { dense: true, mtp: 0 }
  const [shared, whole] = [await temporaryFolder(), await temporaryFolder()]
  await sharing(size, { ...settings, out: shared }, model)
  await replicated(size, { ...settings, out: whole }, model)
  for (const step of [3, 5]) {
    const [own, like] = [shared, whole].map(out =>
      readFile(join(out, 'checkpoints', `step-00000${step}`, 'ema', 'model.safetensors')),
    )
    expect((await own).equals(await like)).toBe(true)
  }
})

test('an optimizer that does not say whose state it has is kept whole by every rank', async () => {
  const sizes: number[][] = [[], []]
  const mine = (of: readonly NamedParameter[]): Optimizer => {
    const adamw = new AdamW(of)
    return {
      name: 'mine',
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
      return mine(of)
    },
  })
  const [first, second] = await sharing(2, own)
  expect(sizes.map(made => made.at(-1))).toEqual([trained(), trained()])
  expect(digestOf(second)).toBe(digestOf(first))
  expect(digestOf(first)).toBe(digestOf((await sharing(2, options))[0]))
  const resumed = await sharing(2, rank => ({ ...own(rank), resume: join(out, 'checkpoints', 'step-000003') }))
  expect(digestOf(resumed[0])).toBe(digestOf(first))
})

test('Muon refuses rows of a matrix', async () => {
  const all = (of: readonly NamedParameter[]) => new Muon(of, { filter: ({ parameter }) => parameter.rank === 2 })
  await expect(sharing(40, { optimizer: all }, { mtp: 0 })).rejects.toThrow(
    /Muon: filter selects (model\.embed_tokens|lm_head)\.weight, but this rank has only some of its rows; exclude embedding tables/,
  )
})

/** Whose head has a gradient that is not finite. */
class Overflowing extends DeepSeek {
  override loss(...given: Parameters<DeepSeek['loss']>) {
    const output = super.loss(...given)
    const large = this.step < 2 ? 0 : 3e38
    return { ...output, loss: output.loss.add(this.lm_head.weight.mul(large).mul(large).sum()) }
  }
}

test('all tell the same parameter whose gradient is not finite, whoever has it', async () => {
  const told = await local(2, ranks =>
    trainSmall(backend, { ranks }, { kind: Overflowing, mtp: 0 }).then(
      () => 'it worked',
      error => `${error.code} ${error.message}`,
    ),
  )
  expect(told[0]).toMatch(
    /^E_NAN train: step 3 has .*, first not finite in the gradient of lm_head\.weight: \d+ of \d+/,
  )
  expect(told[1]).toBe(told[0])
})
