/** @file Data parallelism with `train`: several ranks give the results of one rank with all their rows. */
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'
import { auxFree, combineBalancers, sequenceWise } from '@moe/router'
import { Muon, type TrainEvent, type TrainOptions } from '@moe/trainer'
import { describe, expect, test } from 'vitest'
import { local } from './index.ts'
import { launch, launchers } from './mpi/test-launch.ts'
import { backend, biases, difference, temporaryFolder } from './test-runs.ts'
import { digestOf, smallData, type Trained, trainSmall } from './test-training.ts'

type Options = Partial<TrainOptions>
type Model = Parameters<typeof trainSmall>[2]
const alone = (options: Options, model?: Model) => trainSmall(backend, options, model)
const onRanks = (size: number, options: Options, model?: Model) =>
  local(size, ranks => trainSmall(backend, { ...options, ranks }, model))

describe('data parallelism', () => {
  test.each<{ name: string; options?: Options; model?: Model }>([
    { name: 'AdamW' },
    // With bf16, a rounding difference in a gradient may move tokens to other experts.
    { name: 'Muon', options: { optimizer: parameters => new Muon(parameters, { precision: 'f32' }) } },
    { name: 'strong clipping', options: { clip: 0.01 } },
    { name: 'token dropping', model: { dropping: { devices: 2, undropped: 0.5 } } },
    {
      name: 'a balancer',
      model: { balancer: combineBalancers(auxFree({ speed: 0.01 }), sequenceWise({ alpha: 0.01 })) },
    },
  ])(
    'three ranks are bit-identical, and equal one rank with three micro-batches up to rounding: $name',
    async ({ options = {}, model }) => {
      const one = await alone({ ...options, accumulate: 3 }, model)
      const [first, ...others] = await onRanks(3, options, model)
      for (const other of others) {
        expect(other.weights).toEqual(first.weights)
        expect(other.steps).toEqual(first.steps)
        expect(other.loads).toEqual(first.loads)
      }
      expect(first.loads).toEqual(one.loads)
      const [{ dropped }] = first.loads[0].layers
      expect(dropped ?? 0).toSatisfy((count: number) => count > 0 === (model?.dropping !== undefined))
      // Gradients of embedding and head, from the main model and from MTP, are added in another order. The difference of weights is of the size of rounding,
      // except where a gradient is zero up to rounding, which AdamW divides by its own size.
      expect(difference(first, one)).toBeLessThan(1e-5)
      expect(biases(first)).toEqual(biases(one))
      expect(first.steps[0]).toEqual({ ...one.steps[0], gradNorm: expect.closeTo(one.steps[0].gradNorm, 5) })
      for (const [i, { loss, metrics, tokens }] of first.steps.entries()) {
        expect(loss).toBeCloseTo(one.steps[i].loss, 4)
        expect(metrics.maxVio).toBe(one.steps[i].metrics.maxVio)
        expect(tokens).toBe(one.steps[i].tokens)
      }
    },
  )

  test('two ranks equal one rank with two micro-batches bit for bit if every parameter is used once', async () => {
    const one = await alone({ accumulate: 2 }, { mtp: 0 })
    const [first, second] = await onRanks(2, {}, { mtp: 0 })
    expect(first.steps).toEqual(one.steps)
    expect(first.weights).toEqual(one.weights)
    expect(second.weights).toEqual(one.weights)
  })

  test('two ranks equal one rank with one batch of twice the size up to rounding', async () => {
    // Losses of MTP and balance are means per micro-batch. With different numbers of positions per micro-batch, these differ from the mean of the large batch, also on one rank.
    const model = { mtp: 0, objective: { balanceWeight: 0 } }
    const one = await alone({ batchSize: 4 }, model)
    const [first] = await onRanks(2, { batchSize: 2 }, model)
    expect(difference(first, one)).toBeLessThan(1e-5)
    expect(biases(first)).toEqual(biases(one))
    expect(first.steps.map(({ nll }) => nll)).toEqual(one.steps.map(({ nll }) => expect.closeTo(nll, 5)))
  })

  test('two ranks with two micro-batches each equal one rank with two of twice the size up to rounding', async () => {
    // Rank r has rows 2r and 2r + 1 of each four.
    const one = await alone({ batchSize: 4, accumulate: 2 }, { mtp: 0, objective: { balanceWeight: 0 } })
    const [first] = await onRanks(2, { batchSize: 2, accumulate: 2 }, { mtp: 0, objective: { balanceWeight: 0 } })
    expect(difference(first, one)).toBeLessThan(1e-5)
  })

  test('two ranks with a growing batch equal one rank up to rounding', async () => {
    const grows = (factor: number) => ({ accumulate: (step: number) => factor * (step < 3 ? 1 : 2) })
    const one = await alone(grows(2), { mtp: 0 })
    const [first] = await onRanks(2, grows(1), { mtp: 0 })
    expect(first.steps.map(({ tokens }) => tokens)).toEqual(one.steps.map(({ tokens }) => tokens))
    expect(difference(first, one)).toBeLessThan(1e-5)
  })

  // Batches with padding have an additional array. A rank with such a batch runs op by op while the other replays its recorded step.
  test.each<{ name: string; records: (rank: number) => boolean; options?: Options; model?: Model }>([
    { name: 'all ranks', records: () => true },
    { name: 'all ranks, with several micro-batches', records: () => true, options: { accumulate: 2 } },
    {
      name: 'all ranks, with strong clipping, in bf16',
      records: () => true,
      options: { clip: 0.01, precision: 'bf16' },
    },
    { name: 'all ranks, without experts', records: () => true, model: { mtp: 0, dense: true } },
    { name: 'rank 0 only', records: rank => rank === 0 },
    { name: 'rank 1 only, with several micro-batches', records: rank => rank === 1, options: { accumulate: 2 } },
  ])(
    'recorded steps give the same bits as steps op by op, if recorded by $name',
    async ({ records, options = {}, model }) => {
      const opByOp = await onRanks(2, { ...options, steps: 12 }, model)
      const replayed = [0, 0]
      const recorded = await local(2, ranks => {
        const counting = new Proxy(ranks, {
          get(target, name) {
            const value = Reflect.get(target, name, target)
            if (typeof value !== 'function') return value
            return (...args: unknown[]) => {
              // Only recorded steps pass destination tensors.
              if (name === 'reduceScatterRows' && args[1] !== undefined) replayed[ranks.rank]++
              return value.apply(target, args)
            }
          },
        })
        return trainSmall(backend, { ...options, steps: 12, record: records(ranks.rank), ranks: counting }, model)
      })
      const numbers = (all: readonly Trained[]) => all.map(({ result: _, ...rest }) => rest)
      expect(numbers(recorded)).toEqual(numbers(opByOp))
      expect(replayed.map(times => times > 4)).toEqual([0, 1].map(records))
    },
  )

  test('a communicator of one rank changes nothing', async () => {
    const one = await alone({})
    const [first] = await onRanks(1, {})
    expect(first.steps).toEqual(one.steps)
    expect(first.weights).toEqual(one.weights)
  })
})

describe('a run of two ranks', () => {
  test('is written by rank 0 only, and resumes bit for bit', async () => {
    const out = await temporaryFolder()
    const whole = await onRanks(2, {})
    const schedule = () => 1
    const [straight] = await onRanks(2, { schedule })
    await onRanks(2, { out, schedule, checkpointEvery: 3, keepCheckpoints: 5 })
    const checkpoint = join(out, 'checkpoints', 'step-000003')
    expect(await readdir(join(out, 'checkpoints'))).toEqual(['latest', 'step-000003', 'step-000006', 'step-000008'])
    const lines = (await readFile(join(out, 'metrics.jsonl'), 'utf8')).trim().split('\n')
    expect(lines.map(line => JSON.parse(line).step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8])
    const [first, second] = await onRanks(2, { out, schedule, resume: checkpoint, keepCheckpoints: 5 })
    expect(first.steps).toEqual(straight.steps.slice(3))
    expect(first.weights).toEqual(straight.weights)
    expect(second.weights).toEqual(straight.weights)
    expect(whole[0].weights).not.toEqual(straight.weights)
    // A checkpoint does not depend on the number of ranks, but the number of micro-batches per step must stay the same.
    await expect(alone({ out, schedule, resume: checkpoint })).rejects.toThrow(
      /accumulate \(micro-batches per step, over all ranks\): saved with 2, now 1/,
    )
  })

  test('stops after the same step on all ranks, whichever rank is interrupted or reaches its time limit', async () => {
    const stop = new AbortController()
    const runs = await local(2, ranks =>
      trainSmall(backend, {
        ranks,
        ...(ranks.rank === 1 && { signal: stop.signal }),
        onEvent: event => {
          if (ranks.rank === 1 && event.type === 'step' && event.step === 3) stop.abort()
        },
      }),
    )
    expect(runs.map(({ result }) => [result.steps, result.stopped])).toEqual([
      [3, 'interrupted'],
      [3, 'interrupted'],
    ])
    const late = await local(2, ranks =>
      trainSmall(backend, { ranks, ...(ranks.rank === 0 && { timeLimitSeconds: 1e-9 }) }),
    )
    expect(late.map(({ result }) => [result.steps, result.stopped])).toEqual([
      [1, 'time'],
      [1, 'time'],
    ])
  })

  test('data that becomes unreadable on one rank ends the run on all after a checkpoint, and it resumes from there', async () => {
    const schedule = () => 1
    const straight = await onRanks(2, { schedule })
    const out = await temporaryFolder()
    const broken = { reads: 0 }
    const errors = await local(2, ranks => {
      const data = smallData()
      const read = data.read.bind(data)
      data.read = (from, count) => {
        if (ranks.rank === 0 || broken.reads === 0) return read(from, count)
        broken.reads--
        throw new MoeError({ code: 'E_DATA', op: 'tokenFiles', problem: 'tokens.bin: cannot read the file' })
      }
      const onEvent = (event: TrainEvent) => {
        if (ranks.rank !== 1 || event.type !== 'step') return
        // Once, and then for good. The rows of the next step have been read already.
        if (event.step === 2) broken.reads = 1
        if (event.step === 4) broken.reads = Number.POSITIVE_INFINITY
      }
      const run = trainSmall(backend, { ranks, schedule, out, data: { training: data }, onEvent })
      return run.then(
        () => 'none',
        error => `${error}`,
      )
    })
    expect(errors[0]).toMatch(/on rank 1: tokens.bin: cannot read the file/)
    expect(errors[1]).toMatch(/tokenFiles: tokens.bin: cannot read the file/)
    expect((await readdir(join(out, 'checkpoints'))).sort()).toEqual(['latest', 'step-000005'])
    const resumed = await onRanks(2, { schedule, out, resume: true })
    for (const each of resumed) expect(digestOf(each)).toBe(digestOf(straight[0]))
  })

  test('rejects ranks with different models, weights or steps', async () => {
    const models = local(2, ranks => trainSmall(backend, { ranks }, { mtp: ranks.rank }))
    await expect(models).rejects.toThrow(/parameters is \d+ of \d+ numbers \(\w+\) on rank 0 but \d+ of .* on rank 1/)
    const seeds = local(2, ranks => trainSmall(backend, { ranks }, { seed: ranks.rank }))
    await expect(seeds).rejects.toThrow(/rank 0 starts at step 0 with .* of norm .*, rank 1 at step 0 .*same seed/)
    const out = await temporaryFolder()
    await onRanks(2, { out, steps: 2, schedule: () => 1 })
    const folders = [out, await temporaryFolder()]
    const other = local(2, ranks =>
      trainSmall(backend, { ranks, out: folders[ranks.rank], resume: 'auto', steps: 2, schedule: () => 1 }),
    )
    await expect(other).rejects.toThrow(
      /rank 0 starts at step 2 .*, rank 1 at step 0 .*all ranks must read the same folder/,
    )
  })

  test('fails on all ranks if a step is not finite on one', async () => {
    // All ranks must have the same schedule when they compare their settings.
    let training = false
    const onEvent = ({ type }: TrainEvent) => {
      if (type === 'start') training = true
    }
    const errors = await local(2, ranks => {
      const schedule = (step: number) => (training && step === 1 && ranks.rank === 1 ? Number.MAX_VALUE : 1)
      const run = trainSmall(backend, { ranks, schedule, onEvent })
      return run.then(
        () => 'none',
        error => `${error.code} ${error.message}`,
      )
    })
    for (const error of errors) expect(error).toMatch(/^E_NAN .*step 3/)
  })

  test('rejects the options rank and world together with ranks', async () => {
    await expect(onRanks(2, { world: 2 })).rejects.toThrow(/rank or world is given together with ranks/)
  })
})

// Reason to skip: no MPI is installed here (Debian: apt-get install openmpi-bin, or mpich).
const installed = launchers()
test.skipIf(installed.length === 0)(
  'processes of mpirun give the same bits as the local communicator',
  async () => {
    const script = fileURLToPath(new URL('./test-training.ts', import.meta.url))
    const [first] = await onRanks(2, { accumulate: 2 })
    for (const launcher of installed) {
      const { reports, errors } = await launch(launcher, 2, [script])
      expect(errors).toBe('')
      const printed = { digest: digestOf(first), losses: first.steps.map(({ loss }) => loss), stopped: 'finished' }
      expect(reports).toEqual([0, 1].map(rank => ({ rank, ...printed })))
    }
  },
  240_000,
)
