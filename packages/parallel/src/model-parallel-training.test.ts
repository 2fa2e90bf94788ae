/** @file `train` with pipeline and expert parallelism: runs give the results of one rank, and checkpoints resume with any kind of parallelism. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Random, stateDict } from '@moe/core'
import { DeepSeek, type DeepSeekOptions, presets } from '@moe/deepseek'
import { auxFree, combineBalancers, sequenceWise } from '@moe/router'
import { AdamW, Muon, type Optimizer, readMetrics, TokenDataset, type TrainOptions } from '@moe/trainer'
import { describe, expect, test } from 'vitest'
import { dualPipe, dualPipeV, ExpertParallel, local, oneForwardOneBackward, Pipeline, zeroBubbleH1 } from './index.ts'
import { launch, launchers } from './mpi/test-launch.ts'
import { backend, biases, difference, temporaryFolder, tensorsIn } from './test-runs.ts'
import { digestOf, parallelisms, type Trained, trainSmall } from './test-training.ts'

/** Larger than the default, with which AdamW makes full steps for weights whose gradients are zero up to rounding. */
const eps = 1e-5

type Options = Partial<TrainOptions>
type Parallelism = (typeof parallelisms)[keyof typeof parallelisms]
/** `muon` has its own. */
const withEps = (options: Options): Options => (options.optimizer === undefined ? { eps, ...options } : options)
const alone = (options: Options, model: DeepSeekOptions = {}) =>
  trainSmall(backend, { accumulate: 4, ...withEps(options) }, model)
/** @param options for all ranks, or a function that returns those of a rank */
const onRanks = (
  { accumulate, onRanks }: Parallelism,
  options: Options | ((rank: number) => Options),
  model: DeepSeekOptions = {},
  size = 2,
) =>
  local(size, ranks => {
    const ofRank = typeof options === 'function' ? options(ranks.rank) : options
    return trainSmall(
      backend,
      { accumulate, ...withEps(ofRank) },
      { ...model, onRanks: trainee => onRanks(trainee, ranks) },
    )
  })
const muon = (parameters: ConstructorParameters<typeof Muon>[0]) => new Muon(parameters, { precision: 'f32', eps })
const { data: dataParallel, pipeline: pipelineParallel, expert: expertParallel } = parallelisms
const pipelined = (scheduleOf: typeof dualPipe) => ({
  ...pipelineParallel,
  onRanks: (model: DeepSeek, ranks: Parameters<typeof pipelineParallel.onRanks>[1]) =>
    new Pipeline(model, scheduleOf(ranks.size, 4), ranks),
})

/** Two pipelines of two ranks. */
const replicated = {
  accumulate: 2,
  onRanks: (model: DeepSeek, ranks: Parameters<typeof pipelineParallel.onRanks>[1]) =>
    new Pipeline(model, zeroBubbleH1(2, 2), ranks),
}

/** Two pipelines with sharded experts: each rank has half of the experts of its stages. */
const expertPipelines = {
  accumulate: 2,
  onRanks: (model: DeepSeek, ranks: Parameters<typeof pipelineParallel.onRanks>[1]) =>
    new Pipeline(model, zeroBubbleH1(ranks.size / 2, 2), ranks, { expertParallelSize: 2 }),
}

/** Experts sharded over two pairs of ranks. */
const expertPairs = {
  accumulate: 1,
  onRanks: (model: DeepSeek, ranks: Parameters<typeof pipelineParallel.onRanks>[1]) =>
    new ExpertParallel(model, ranks, { expertParallelSize: 2 }),
}

const kinds = [
  ['a pipeline with ZB-H1', pipelineParallel, 2],
  ['a pipeline with DualPipeV', pipelined(dualPipeV), 2],
  ['a pipeline with DualPipe, with stages on two ranks', pipelined(dualPipe), 2],
  ['two pipelines', replicated, 4],
  ['expert parallelism', expertParallel, 2],
  ['pipelines with sharded experts', expertPipelines, 4],
] as const

describe.each(kinds)('a run with %s', (_, parallelism, size) => {
  test.each<[string, Options, DeepSeekOptions]>([
    ['AdamW', { steps: 24 }, {}],
    ['Muon', { optimizer: muon }, {}],
    ['strong clipping', { clip: 0.01 }, {}],
    ['no clipping', { clip: Number.POSITIVE_INFINITY }, {}],
    ['token dropping', {}, { dropping: { devices: 2, undropped: 0.5 } }],
    ['a balancer', {}, { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) }],
  ])('gives the results of one rank: %s', async (_, options, model) => {
    const one = await alone(options, model)
    const [first, ...others] = await onRanks(parallelism, options, model, size)
    // At the end, every rank has the complete model.
    for (const other of others) {
      expect(digestOf(other)).toBe(digestOf(first))
      expect(other.steps).toEqual(first.steps)
      expect(other.loads).toEqual(first.loads)
    }
    expect(first.loads).toEqual(one.loads)
    const [{ layers }] = first.loads
    expect(layers).toHaveLength(3)
    for (const { dropped = 0 } of layers) expect(dropped > 0).toBe(model.dropping !== undefined)
    // Up to rounding, as with data parallelism.
    expect(difference(first, one)).toBeLessThan(1e-5)
    expect(biases(first)).toEqual(biases(one))
    expect(first.steps).toHaveLength(options.steps ?? 8)
    for (const [i, { loss, nll, gradNorm, metrics, ...others }] of first.steps.entries()) {
      const { loss: _loss, nll: _nll, gradNorm: _gradNorm, metrics: _metrics, ...expected } = one.steps[i]
      expect(others).toEqual(expected)
      expect(loss).toBeCloseTo(one.steps[i].loss, 4)
      expect(nll).toBeCloseTo(one.steps[i].nll, 4)
      expect(gradNorm).toBeCloseTo(one.steps[i].gradNorm, 4)
      const near = Object.entries(one.steps[i].metrics).map(([name, value]) => [name, expect.closeTo(value, 4)])
      expect(metrics).toEqual(Object.fromEntries(near))
      expect(metrics.maxVio).toBe(one.steps[i].metrics.maxVio)
    }
  })

  test('resumes bit for bit, and writes the same files as one rank', async () => {
    const [straight] = await onRanks(parallelism, { schedule: () => 1 }, {}, size)
    const [out, ofOne] = [await temporaryFolder(), await temporaryFolder()]
    const shared = { schedule: () => 1, checkpointEvery: 3, keepCheckpoints: 5 }
    const written = await onRanks(parallelism, { ...shared, out }, {}, size)
    const one = await alone({ ...shared, out: ofOne })
    // Only rank 0 writes.
    const [last, ...none] = written.map(({ result }) => result.checkpoint)
    expect([last, new Set(none)]).toEqual([join(out, 'checkpoints', 'step-000008'), new Set([undefined])])
    const checkpoint = join(out, 'checkpoints', 'step-000003')
    for (const file of ['optimizer.safetensors', join('model', 'model.safetensors')]) {
      const like = join(ofOne, 'checkpoints', 'step-000003')
      expect(await tensorsIn(join(checkpoint, file))).toEqual(await tensorsIn(join(like, file)))
    }
    const [lines, like] = [
      await readMetrics(join(out, 'metrics.jsonl')),
      await readMetrics(join(ofOne, 'metrics.jsonl')),
    ]
    expect(lines.map(line => [line.step, Object.keys(line).sort()])).toEqual(
      like.map(line => [line.step, Object.keys(line).sort()]),
    )
    const loads = (of: string) => readFile(join(of, 'loads.jsonl'), 'utf8')
    expect(await loads(out)).toBe(await loads(ofOne))
    expect(written[0].result).toMatchObject({ steps: 8, parameters: one.result.parameters, tokens: one.result.tokens })
    const [first, ...others] = await onRanks(parallelism, { ...shared, out, resume: checkpoint }, {}, size)
    expect(first.steps).toEqual(straight.steps.slice(3))
    for (const each of [first, ...others]) expect(digestOf(each)).toBe(digestOf(straight))
    expect(await loads(out)).toBe(await loads(ofOne))
    const opened = await DeepSeek.fromPretrained(join(first.result.checkpoint as string, 'model'), { backend })
    const entries = stateDict(opened).map(async ({ name, data }) => [name, Array.from(await data())] as const)
    expect(digestOf({ weights: Object.fromEntries(await Promise.all(entries)) })).toBe(digestOf(first))
    opened.dispose()
  })

  // Compared with the same ranks only: a rounding difference in a gradient may be one of a moment in bf16.
  test('resumes bit for bit with moments in bf16', async () => {
    const narrow = { schedule: () => 1, moments: 'bf16' } as const
    const [straight] = await onRanks(parallelism, narrow, {}, size)
    const [out, ofOne] = [await temporaryFolder(), await temporaryFolder()]
    const shared = { ...narrow, checkpointEvery: 3, keepCheckpoints: 5 }
    await onRanks(parallelism, { ...shared, out }, {}, size)
    await alone({ ...shared, out: ofOne, steps: 1 })
    const file = (of: string, step: number) => join(of, 'checkpoints', `step-00000${step}`, 'optimizer.safetensors')
    expect(await tensorsIn(file(out, 3))).toEqual(await tensorsIn(file(ofOne, 1)))
    expect(await tensorsIn(file(out, 3))).toMatchObject({ 'v.lm_head.weight': ['BF16', [40, 24]] })
    const resumed = await onRanks(parallelism, { ...shared, out, resume: join(file(out, 3), '..') }, {}, size)
    expect(resumed[0].steps).toEqual(straight.steps.slice(3))
    for (const each of resumed) expect(digestOf(each)).toBe(digestOf(straight))
  })
})

/** Training and held-out documents. */
const heldOut = () => {
  const document = (n: number) => Int32Array.from({ length: 60 }, (_, i) => 2 + ((i * i * n + 3 * i) % 38))
  return {
    training: TokenDataset.fromTokens([1, 2, 3].map(document)),
    validation: TokenDataset.fromTokens([document(5)]),
  }
}

describe.each([
  ['two pipelines', replicated, 4, {}],
  ['a pipeline with stages on two ranks', pipelined(dualPipe), 2, {}],
  ['expert parallelism in two pairs of ranks', expertPairs, 4, {}],
  ['pipelines with sharded experts', expertPipelines, 4, {}],
  ['data parallelism', dataParallel, 2, {}],
  ['data parallelism, recorded', dataParallel, 2, { record: true }],
] as const)('the EMA of the weights with %s', (_, parallelism, size, options: Options) => {
  const settings = {
    data: heldOut(),
    schedule: () => 1,
    evalEvery: 4,
    checkpointEvery: 3,
    keepCheckpoints: 5,
    ema: 0.8,
    ...options,
  }
  const emaIn = async (out: string, step: number) => {
    const folder = join(out, 'checkpoints', `step-00000${step}`, 'ema')
    const opened = await DeepSeek.fromPretrained(folder, { backend })
    const entries = stateDict(opened).map(async ({ name, data }) => [name, Array.from(await data())] as const)
    const weights = Object.fromEntries(await Promise.all(entries))
    opened.dispose()
    return { weights }
  }

  test('equals that of one rank, does not change the training, and resumes bit for bit', async () => {
    const [out, ofOne, cut] = [await temporaryFolder(), await temporaryFolder(), await temporaryFolder()]
    const one = await alone({ ...settings, out: ofOne })
    const { ema: _, ...without } = settings
    const [plain] = await onRanks(parallelism, without, {}, size)
    const [first, ...others] = await onRanks(parallelism, { ...settings, out }, {}, size)
    for (const each of [first, ...others]) {
      expect(digestOf(each)).toBe(digestOf(plain))
      expect(each.result.ema?.loss).toBe(first.result.ema?.loss)
    }
    expect(first.steps).toEqual(plain.steps)
    expect(first.result.validation.loss).toBe(plain.result.validation.loss)
    expect(first.result.ema?.loss).toBeCloseTo(one.result.ema?.loss as number, 4)
    for (const step of [3, 8]) expect(difference(await emaIn(out, step), await emaIn(ofOne, step))).toBeLessThan(1e-5)

    await onRanks(parallelism, { ...settings, out: cut }, {}, size)
    const resume = join(cut, 'checkpoints', 'step-000003')
    const [resumed] = await onRanks(parallelism, { ...settings, out: cut, resume }, {}, size)
    expect(resumed.result.ema?.loss).toBe(first.result.ema?.loss)
    expect(digestOf(await emaIn(cut, 8))).toBe(digestOf(await emaIn(out, 8)))
    // A finished run is only evaluated again.
    for (const { result } of await onRanks(parallelism, { ...settings, out: cut, resume: true }, {}, size))
      expect(result.ema?.loss).toBe(first.result.ema?.loss)
    // One rank can resume, too, with the same results up to rounding.
    const rest = await alone({ ...settings, out: cut, resume })
    expect(rest.result.ema?.loss).toBeCloseTo(one.result.ema?.loss as number, 4)
  })
})

test('the EMA of the weights resumes bit for bit if embedding tables are split between ranks', async () => {
  const out = await temporaryFolder()
  const manyRanks = { ...expertPairs, accumulate: 1 }
  const settings = { data: heldOut(), schedule: () => 1, steps: 4, checkpointEvery: 2, batchSize: 1, ema: 0.8, out }
  const [first, ...others] = await onRanks(manyRanks, settings, {}, 16)
  for (const { result } of others) expect(result.ema?.loss).toBe(first.result.ema?.loss)
  const resume = join(out, 'checkpoints', 'step-000002')
  for (const each of await onRanks(manyRanks, { ...settings, resume }, {}, 16)) {
    expect(each.result.ema?.loss).toBe(first.result.ema?.loss)
    expect(digestOf(each)).toBe(digestOf(first))
  }
})

describe('a checkpoint resumes with any kind of parallelism and the same number of micro-batches', () => {
  const all: Record<string, (options: Options) => Promise<Trained>> = {
    'one rank': options => alone(options),
    'data parallelism': async options => (await onRanks(dataParallel, options))[0],
    'a pipeline': async options => (await onRanks(pipelineParallel, options))[0],
    'one rank per layer': async options => (await onRanks(pipelined(oneForwardOneBackward), options, {}, 5))[0],
    'two pipelines': async options => (await onRanks(replicated, options, {}, 4))[0],
    'expert parallelism': async options => (await onRanks(expertParallel, options))[0],
    'pipelines with sharded experts': async options => (await onRanks(expertPipelines, options, {}, 4))[0],
    'expert parallelism in two pairs of ranks': async options => (await onRanks(expertPairs, options, {}, 4))[0],
    'expert parallelism on four ranks': async options =>
      (await onRanks({ ...expertParallel, accumulate: 1 }, options, {}, 4))[0],
  }

  test.each(Object.keys(all))('saved by %s', async from => {
    const options = { schedule: () => 1, ...(from === 'expert parallelism' && { optimizer: muon }) }
    const straight = await all['one rank'](options)
    const out = await temporaryFolder()
    const resume = join(out, 'checkpoints', 'step-000003')
    await all[from]({ ...options, out, checkpointEvery: 3, keepCheckpoints: 5 })
    for (const to of Object.keys(all)) {
      const resumed = await all[to]({ ...options, out, resume, keepCheckpoints: 5 })
      expect(resumed.steps.map(({ step }) => step)).toEqual([4, 5, 6, 7, 8])
      expect(difference(resumed, straight)).toBeLessThan(1e-5)
      expect(biases(resumed)).toEqual(biases(straight))
      for (const [i, { loss }] of resumed.steps.entries()) expect(loss).toBeCloseTo(straight.steps[3 + i].loss, 4)
    }
  })

  test('but not with other settings of its optimizer', async () => {
    const out = await temporaryFolder()
    await onRanks(pipelineParallel, { out, steps: 2, schedule: () => 1 })
    const other = alone({ out, steps: 2, schedule: () => 1, resume: true, decays: () => false })
    await expect(other).rejects.toThrow(/optimizer: saved with adamw .*"decaying":[1-9]\d*}, now adamw .*"decaying":0}/)
  })
})

test('evaluations during training use the complete model, and training continues afterwards', async () => {
  const losses: number[][] = []
  const evaluated = (rank: number): Options => ({
    data: heldOut(),
    steps: 6,
    evalEvery: 2,
    onEvent: event => {
      if (event.type === 'evaluation') losses[rank] = [...(losses[rank] ?? []), event.loss]
    },
  })
  await alone(evaluated(2))
  expect(losses[2]).toHaveLength(3)
  for (const parallelism of [pipelineParallel, expertParallel]) {
    await onRanks(parallelism, evaluated)
    for (const rank of [0, 1]) {
      expect(losses[rank]).toEqual(losses[2].map(loss => expect.closeTo(loss, 4)))
      losses[rank] = []
    }
  }
})

describe.each([
  ['pipeline parallelism', pipelineParallel],
  ['expert parallelism', expertParallel],
] as const)('%s', (_, parallelism) => {
  const onTwoRanks = (options: (rank: number) => Options) => onRanks(parallelism, options)

  test('stops after the same step on all ranks, whichever rank is interrupted or reaches its time limit, and resumes', async () => {
    const out = await temporaryFolder()
    const stop = new AbortController()
    const schedule = () => 1
    const runs = await onTwoRanks(rank => ({
      schedule,
      // Only rank 0 needs the folder.
      ...(rank === 0 && { out }),
      ...(rank === 1 && { signal: stop.signal }),
      onEvent: event => {
        if (rank === 1 && event.type === 'step' && event.step === 3) stop.abort()
      },
    }))
    for (const { result } of runs) expect(result).toMatchObject({ steps: 3, stopped: 'interrupted' })
    expect(digestOf(runs[1])).toBe(digestOf(runs[0]))
    const late = await onTwoRanks(rank => ({
      schedule,
      out,
      resume: true,
      ...(rank === 0 && { timeLimitSeconds: 1e-9 }),
    }))
    for (const { result } of late) expect(result).toMatchObject({ steps: 4, stopped: 'time' })
    const [rest] = await onTwoRanks(() => ({ schedule, out, resume: true }))
    expect(digestOf(rest)).toBe(digestOf((await onTwoRanks(() => ({ schedule })))[0]))
  })

  test('a step that is not finite on one rank is an error on all, which names the parameter', async () => {
    const errors: unknown[] = []
    const out = await temporaryFolder()
    // All ranks must have the same schedule when they compare their settings.
    let training = false
    const schedule = (rank: number) => (step: number) => (training && step === 1 && rank === 1 ? Number.MAX_VALUE : 1)
    const run = onTwoRanks(rank => ({
      schedule: schedule(rank),
      out,
      checkpointEvery: 1,
      onEvent: event => {
        if (event.type === 'start') training = true
        if (event.type === 'fail') errors.push(event.error)
      },
    }))
    // The second step made weights of rank 1 infinite, so that they are not saved.
    await expect(run).rejects.toThrow(
      /^train: after step 2 the model contains non-finite numbers, first in the values of /,
    )
    expect(errors.map(String)).toEqual(
      [1, 2].map(() => expect.stringMatching(/after step 2 the model contains non-finite numbers/)),
    )
    training = false
    const unsaved = onTwoRanks(rank => ({
      schedule: schedule(rank),
      onEvent: event => {
        if (event.type === 'start') training = true
        if (event.type === 'fail') errors.push(event.error)
      },
    }))
    await expect(unsaved).rejects.toThrow(
      /^train: step 3 has loss NaN and gradient norm NaN, first not finite in the values of \S+: /,
    )
    expect(String(errors[3])).toBe(String(errors[2]))
  })

  test('a rank that fails ends the others, with its error', async () => {
    const errors: unknown[] = []
    const run = onTwoRanks(rank => ({
      onEvent: event => {
        if (event.type === 'fail') errors[rank] = event.error
        if (rank === 1 && event.type === 'step' && event.step === 3) throw new Error('rank 1 failed on purpose')
      },
    }))
    await expect(run).rejects.toThrow('rank 1 failed on purpose')
    expect(errors.map(String)).toEqual([
      expect.stringMatching(/waiting for a message that will not arrive: rank 1 has failed: rank 1 failed on purpose/),
      'Error: rank 1 failed on purpose',
    ])
  })
})

describe('train with ranks rejects', () => {
  const run = (options: Options, onRanks: Parameters<typeof trainSmall>[2] = {}) =>
    local(1, ranks =>
      trainSmall(backend, { ...options }, { onRanks: model => pipelineParallel.onRanks(model, ranks), ...onRanks }),
    )

  test('a number of micro-batches other than that of the schedule', async () => {
    await expect(run({ accumulate: 3 })).rejects.toThrow(/accumulate is 3, but ranks need 4 micro-batches per step/)
    await expect(run({ accumulate: () => 4 })).rejects.toThrow(
      /accumulate is .*, but ranks need 4 micro-batches per step/,
    )
    const [{ steps }] = await run({ steps: 1 })
    expect(steps[0].tokens).toBe(64)
  })

  test('a model that draws random numbers, for pipeline parallelism', async () => {
    class Drawing extends DeepSeek {
      drawn = new Random(1)
    }
    await local(1, async ranks => {
      const onRanks = (model: DeepSeek) => new Pipeline(model, oneForwardOneBackward(1, 1), ranks)
      await expect(trainSmall(backend, {}, { kind: Drawing, onRanks })).rejects.toThrow(
        'the model draws random numbers from drawn, which pipeline and expert parallelism do not support; use data parallelism',
      )
    })
  })

  test('a Pipeline or ExpertParallel of another model', async () => {
    await local(1, async ranks => {
      const model = new DeepSeek(
        { ...presets.tiny, vocab_size: 40, hidden_size: 16, num_hidden_layers: 1 },
        { backend },
      )
      const pipeline = new Pipeline(model, oneForwardOneBackward(1, 1), ranks)
      const parallel = new ExpertParallel(model, ranks)
      for (const onRanks of [() => pipeline, () => parallel])
        await expect(trainSmall(backend, {}, { onRanks })).rejects.toThrow(
          /ranks train model\.embed_tokens\.weight, which is not a parameter of the model; create the Pipeline/,
        )
      parallel.dispose()
      model.dispose()
    })
  })

  test('an optimizer whose entries do not name their parameters', async () => {
    const optimizer = (parameters: ConstructorParameters<typeof AdamW>[0]): Optimizer => {
      const adamw = new AdamW(parameters)
      const entries = () => adamw.entries().map(({ parameter: _, ...entry }) => entry)
      return {
        name: 'custom',
        settings: of => adamw.settings(of),
        step: (lr, gradScale) => adamw.step(lr, gradScale),
        load: (source, steps) => adamw.load(source, steps),
        dispose: () => adamw.dispose(),
        entries,
      }
    }
    await expect(run({ optimizer })).rejects.toThrow(
      /custom does not say which parameter its state m\.model\.embed_tokens\.weight belongs to/,
    )
  })

  test('values that are not ranks, and ranks with different options', async () => {
    const runWith = (ranks: unknown) => trainSmall(backend, { ranks } as Options)
    await expect(runWith(Promise.resolve())).rejects.toThrow(/ranks is a promise, expected the result of await mpi\(\)/)
    await expect(runWith({})).rejects.toThrow(/ranks is not a communicator/)
    const different = (options: (rank: number) => Options) =>
      local(2, ranks => trainSmall(backend, { ranks, ...options(ranks.rank) }))
    await expect(different(evalEvery => ({ evalEvery }))).rejects.toThrow(
      /evalEvery is 0 on rank 0 but 1 on rank 1; pass the same model, data and options to train on every rank/,
    )
    await expect(different(rank => ({ lr: 1e-3 + rank }))).rejects.toThrow(
      /lr is 0\.001 on rank 0 but 1\.001 on rank 1/,
    )
    await expect(different(rank => (rank === 0 ? {} : { ema: 0.9 }))).rejects.toThrow(
      /ema is not set on rank 0 but 0\.9 on rank 1/,
    )
  })

  test('ranks with different weights, for expert parallelism', async () => {
    const seeds = local(2, ranks =>
      trainSmall(backend, {}, { seed: ranks.rank, onRanks: model => expertParallel.onRanks(model, ranks) }),
    )
    await expect(seeds).rejects.toThrow(/rank 0 starts at step 0 with \S+ of norm \S+, rank 1 at step 0 .*same seed/)
  })
})

// Reason to skip: no MPI is installed here (Debian: apt-get install openmpi-bin, or mpich).
const installed = launchers()
describe.skipIf(installed.length === 0)('processes of mpirun', () => {
  const script = fileURLToPath(new URL('./test-training.ts', import.meta.url))

  test.each(['pipeline', 'expert'] as const)(
    'give the same bits as the local communicator, stop together and fail together: %s parallelism',
    async kind => {
      const [first] = await onRanks(parallelisms[kind], { eps: 1e-8 })
      const losses = first.steps.map(({ loss }) => loss)
      for (const launcher of installed) {
        const whole = await launch(launcher, 2, [script, kind])
        expect(whole.errors).toBe('')
        const printed = { digest: digestOf(first), losses, stopped: 'finished' }
        expect(whole.reports).toEqual([0, 1].map(rank => ({ rank, ...printed })))

        const stopped = await launch(launcher, 2, [script, kind, 'terminate'])
        expect(stopped.errors).toBe('SIGTERM: training stops after the current step; a second signal exits at once\n')
        // The signal is handled in the next turn of the event loop, during the fourth step.
        const { digest } = stopped.reports[0]
        const cut = { digest, losses: losses.slice(0, 4), stopped: 'interrupted' }
        expect(stopped.reports).toEqual([0, 1].map(rank => ({ rank, ...cut })))

        const failed = await launch(launcher, 2, [script, kind, 'fail'])
        expect(failed.code).not.toBe(0)
        expect(failed.reports).toEqual([])
        expect(failed.errors).toMatch(/Error: rank 1 failed on purpose/)
      }
    },
    240_000,
  )
})
