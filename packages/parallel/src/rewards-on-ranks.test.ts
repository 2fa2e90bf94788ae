/** @file Reinforcement and preference learning with data parallelism: several ranks give the results of one rank with all their prompts. */
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { deferWeights } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import {
  preferences,
  type Rollouts,
  type ScoringModel,
  type TokenBatch,
  type TrainEvent,
  type TrainOptions,
} from '@moe/trainer'
import { describe, expect, test } from 'vitest'
import { ExpertParallel, local } from './index.ts'
import { launch, launchers } from './mpi/test-launch.ts'
import { prompts, rewardSmall, smallRollouts } from './test-rewards.ts'
import { backend, temporaryFolder } from './test-runs.ts'
import { digestOf, parallelisms, smallConfig, type Trained } from './test-training.ts'

/** Calls `fn` with a reference model, which is freed afterwards. */
async function withReference<T>(fn: (reference: DeepSeek) => Promise<T>): Promise<T> {
  const reference = new DeepSeek(smallConfig, { seed: 2, backend })
  return fn(reference).finally(() => reference.dispose())
}
type Options = Partial<TrainOptions>
type Model = Parameters<typeof rewardSmall>[2]
const alone = (options: Options, model?: Model) => rewardSmall(backend, options, model)
const onRanks = (size: number, options: Options, model?: Model) =>
  local(size, ranks => rewardSmall(backend, { ...options, ranks }, model))

const validation = prompts.slice(0, 5).map(({ tokens }) => ({ tokens: [9, ...tokens], constantReward: false }))

const numbers = ({ steps }: Trained) =>
  steps.map(({ metrics: { samplingSeconds, ...metrics }, ...rest }) => ({ ...rest, metrics }))

/** Without MTP and the balance loss, whose results depend on micro-batches and on the order of sums. */
const independent = { mtp: 0, objective: { balanceWeight: 0 } } satisfies Model

/** Different texts have different rewards, so that each group has a learning signal. */
const distinctReward = ({ tokens }: { readonly tokens: readonly number[] }) =>
  tokens.reduce((sum, token, t) => sum + Math.sqrt(token + t), 0)

/** The evaluation events of a run, without times. */
const evaluations = (events: readonly TrainEvent[]) =>
  events.flatMap(event => {
    if (event.type !== 'evaluation') return []
    const { seconds, ...rest } = event
    return [rest]
  })

describe('reinforcement learning on several ranks', () => {
  test.each<{ rollout: Parameters<typeof smallRollouts>[0] }>([
    { rollout: {} },
    { rollout: { updates: 3, average: 'text' } },
  ])('equals one rank with all groups bit for bit, with one micro-batch per rank: $rollout', async ({ rollout }) => {
    // One text is generated at a time and trained in its own row, so that nothing depends on the other texts.
    const rolloutsOf = (groups: number) =>
      smallRollouts({ reward: distinctReward, maxTexts: 1, validation, groups, ...rollout })
    const options = { batchSize: 12, isolate: false, evalEvery: 3 }
    const events: TrainEvent[][] = [[], []]
    const one = await alone({ ...options, data: rolloutsOf(6), onEvent: event => events[0].push(event) }, independent)
    const [first, second] = await local(2, ranks => {
      const onEvent = (event: TrainEvent) => ranks.rank === 1 && events[1].push(event)
      return rewardSmall(backend, { ...options, data: rolloutsOf(3), ranks, onEvent }, independent)
    })
    expect(numbers(first)).toEqual(numbers(one))
    expect(first.weights).toEqual(one.weights)
    expect(second.steps).toEqual(first.steps)
    expect(second.weights).toEqual(first.weights)
    expect(evaluations(events[1])).toEqual(evaluations(events[0]))
    expect(evaluations(events[0])).toHaveLength(2)
    const [started, startedAlone] = [events[1], events[0]].map(ofRun => ofRun.find(event => event.type === 'start'))
    expect(started).toMatchObject({ textsPerStep: 24, settings: startedAlone?.settings })
  })

  test.each<{ name: string; size: number; options?: Options; model?: Model; weight?: number; digits?: number }>([
    { name: 'two ranks', size: 2 },
    { name: 'three ranks, recorded', size: 3, options: { record: true, steps: 10 } },
    { name: 'two ranks, in bf16, recorded', size: 2, options: { record: true, precision: 'bf16' }, digits: 2 },
    { name: 'two ranks, with a reference model', size: 2, weight: 0.1 },
    // Which tokens are dropped depends on the other rows of the micro-batch.
    { name: 'two ranks, with token dropping', size: 2, model: { dropping: { devices: 2, undropped: 0.5 } }, digits: 0 },
  ])(
    'is bit-identical on all ranks, and generates the texts of one rank: $name',
    async ({ size, options = {}, model, weight, digits = 5 }) => {
      const [one, [first, ...others]] = await withReference(async reference => {
        const heldOut = { validation: validation.slice(0, 1) }
        const rolloutsOf = (groups: number) =>
          smallRollouts({ groups, ...heldOut, ...(weight && { kl: { weight, reference }, updates: 2 }) })
        const one = await alone({ ...options, data: rolloutsOf(3 * size) }, model)
        return [one, await onRanks(size, { ...options, data: rolloutsOf(3) }, model)]
      })
      for (const other of others) {
        expect(other.steps).toEqual(first.steps)
        expect(other.loads).toEqual(first.loads)
        expect(other.weights).toEqual(first.weights)
        expect(other.result.validation).toEqual({ ...first.result.validation, seconds: expect.any(Number) })
      }
      const [{ metrics, nll }] = first.steps
      const expected = one.steps[0]
      for (const name of ['reward', 'rewardStd', 'flatGroups', 'textLength', 'cutOff'])
        expect(metrics[name]).toBeCloseTo(expected.metrics[name], 12)
      for (const name of ['entropy', 'objective', ...(weight ? ['kl'] : [])])
        expect(metrics[name]).toBeCloseTo(expected.metrics[name], digits)
      expect(nll).toBeCloseTo(expected.nll, digits)
      for (const { metrics } of first.steps) expect(Object.values(metrics).every(Number.isFinite)).toBe(true)
    },
  )

  test('gives the same bits with recorded steps as op by op', async () => {
    const options = { steps: 10, batchSize: 3 }
    const opByOp = await onRanks(2, options)
    const recorded = await onRanks(2, { ...options, record: true })
    expect(recorded.map(numbers)).toEqual(opByOp.map(numbers))
    expect(recorded.map(({ weights }) => weights)).toEqual(opByOp.map(({ weights }) => weights))
  })

  test.each<{ record: boolean; model: Model }>([
    { record: false, model: independent },
    { record: true, model: independent },
    { record: true, model: {} },
  ])(
    'continues if all groups of a rank are flat, so that it has only padding: recorded $record, $model',
    async ({ record, model }) => {
      // Each rank has one of two prompts, in turns. All texts of the second have the same reward.
      const two = [prompts[0], { ...prompts[1], constantReward: true }]
      const rolloutsOf = (groups: number) => smallRollouts({ groups, maxTexts: 1 }, two)
      const options = { steps: 8, batchSize: 1, record, eps: 1e-5 }
      const one = await alone({ ...options, data: rolloutsOf(2) }, model)
      const [first, second] = await onRanks(2, { ...options, data: rolloutsOf(1) }, model)
      expect(second.steps).toEqual(first.steps)
      expect(second.weights).toEqual(first.weights)
      for (const [i, { metrics, loss, nll, gradNorm }] of first.steps.entries()) {
        expect(metrics['flatGroups']).toBeGreaterThanOrEqual(0.5)
        const expected = one.steps[i]
        for (const [own, other] of [
          [metrics['reward'], expected.metrics['reward']],
          [metrics['maxVio'], expected.metrics['maxVio']],
          [loss, expected.loss],
          [nll, expected.nll],
          [gradNorm, expected.gradNorm],
        ])
          expect(own).toBeCloseTo(other, 4)
      }
    },
  )
})

describe('reinforcement learning on two ranks', () => {
  test('resumes bit for bit, and on one rank with the prompts of both', async () => {
    const out = await temporaryFolder()
    const [straight] = await onRanks(2, {})
    await onRanks(2, { out, checkpointEvery: 2, keepCheckpoints: 9 })
    const resume = join(out, 'checkpoints', 'step-000002')
    const resumed = { out, resume, keepCheckpoints: 9 }
    const [first, second] = await onRanks(2, resumed)
    expect(numbers(first)).toEqual(numbers(straight).slice(2))
    expect(first.weights).toEqual(straight.weights)
    expect(second.weights).toEqual(straight.weights)
    const one = await alone({ ...resumed, data: smallRollouts({ groups: 6 }) })
    expect(one.steps.map(({ step }) => step)).toEqual([3, 4, 5, 6])
    expect(one.steps[0].metrics['reward']).toBeCloseTo(straight.steps[2].metrics['reward'], 12)
    await expect(alone(resumed)).rejects.toThrow(
      /data: saved with 7 prompts .*"groups":6,.* now 7 prompts .*"groups":3,/,
    )
  })

  test('ends on both ranks if a reward function fails on one, after saving a checkpoint', async () => {
    const out = await temporaryFolder()
    const [whole] = await onRanks(2, {})
    let steps = 0
    let saved = false
    const errors = await local(2, ranks => {
      const usual = smallRollouts()
      const reward: Rollouts['reward'] = (sample, options) => {
        if (ranks.rank === 1 && steps === 3) throw new Error('no such server')
        return usual.reward(sample, options)
      }
      const onEvent = async (event: TrainEvent) => {
        if (event.type === 'step') steps = event.step
        if (event.type !== 'checkpoint') return
        await new Promise(resolve => setTimeout(resolve, 20))
        saved = true
      }
      return rewardSmall(backend, { data: { ...usual, reward }, ranks, out, onEvent }).then(
        () => undefined,
        error => {
          // The error must not end the process before rank 0 has saved.
          expect(saved).toBe(true)
          return error
        },
      )
    })
    for (const error of errors) expect(error).toMatchObject({ code: 'E_DATA', op: 'reward' })
    expect(errors[1].message).toMatch(
      /^reward: the reward of a text of \d tokens, "" failed: no such server; catch errors/,
    )
    expect(errors[1].cause.message).toBe('no such server')
    expect(errors[0].message).toMatch(
      /^reward: on rank 1: the reward of a text of \d tokens, "" failed: no such server;/,
    )
    expect(await readdir(join(out, 'checkpoints'))).toEqual(['latest', 'step-000003'])
    const [rest] = await onRanks(2, { out, resume: true })
    expect(numbers(rest)).toEqual(numbers(whole).slice(3))
    expect(rest.weights).toEqual(whole.weights)
  })

  test.each(['texts', 'held-out texts'])(
    'stops on both ranks if one is interrupted while rewards of %s are pending',
    async kind => {
      const controller = new AbortController()
      let aborted = 0
      const events: TrainEvent[] = []
      const runs = await local(2, ranks => {
        const usual = smallRollouts({ validation })
        const reward: Rollouts['reward'] = (sample, options) => {
          const held = validation.includes(sample.prompt as (typeof validation)[number])
          const due = kind === 'texts' ? !held && steps === 2 : held
          if (ranks.rank === 0 || !due) return usual.reward(sample, options)
          // Never resolves.
          options.signal.addEventListener('abort', () => aborted++)
          setTimeout(() => controller.abort())
          return new Promise(() => {})
        }
        let steps = 0
        const onEvent = (event: TrainEvent) => {
          events.push(event)
          if (event.type === 'step') steps = event.step
        }
        const signal = ranks.rank === 1 ? { signal: controller.signal } : {}
        return rewardSmall(backend, { data: { ...usual, reward }, ranks, evalEvery: 4, onEvent, ...signal })
      })
      const steps = kind === 'texts' ? 2 : 4
      expect(runs.map(({ result }) => [result.steps, result.stopped])).toEqual(Array(2).fill([steps, 'interrupted']))
      expect(aborted).toBeGreaterThan(0)
      expect(evaluations(events)).toEqual([])
      expect(runs[0].weights).toEqual(runs[1].weights)
    },
  )

  test('stops on both ranks at the time limit of one, after complete updates', async () => {
    const runs = await local(2, ranks => {
      const limit = ranks.rank === 1 ? { timeLimitSeconds: 1e-9 } : {}
      return rewardSmall(backend, { data: smallRollouts({ updates: 3 }), ranks, ...limit })
    })
    expect(runs.map(({ result }) => [result.steps, result.stopped])).toEqual(Array(2).fill([3, 'time']))
  })

  test('rejects ranks with different prompts, and pipelines', async () => {
    const different = local(2, ranks =>
      rewardSmall(backend, { ranks, data: smallRollouts({ groups: 3 + ranks.rank }) }),
    )
    await expect(different).rejects.toThrow(
      /data is 7 prompts .*"groups":6,.* on rank 0 but 7 prompts .*"groups":8,.* on rank 1/,
    )
    const { onRanks } = parallelisms.pipeline
    const parts = local(2, ranks => rewardSmall(backend, {}, { onRanks: model => onRanks(model, ranks) }))
    await expect(parts).rejects.toThrow('ranks is a Pipeline, which does not support rollouts: pass an ExpertParallel')
  })
})

const preferencePairs = Array.from({ length: 9 }, (_, i) => ({
  tokens: [3, 4 + i],
  chosen: [...Array(i + 1).fill(5 + i), 1],
  rejected: [20 + i, 21, 1],
}))

describe('preferences', () => {
  const preferencesOf = (count: number, reference: DeepSeek) =>
    preferences(preferencePairs, { reference, pairs: count, validation: preferencePairs.slice(0, 5) })

  test('trained on two ranks give the results of one rank with the pairs of both', async () => {
    const options = { isolate: false, batchSize: 6, lr: 1e-2 }
    const [one, [first, second]] = await withReference(async reference => [
      await alone({ ...options, data: preferencesOf(6, reference) }, independent),
      await onRanks(2, { ...options, data: preferencesOf(3, reference) }, independent),
    ])
    expect(first.steps).toEqual(one.steps)
    expect(first.weights).toEqual(one.weights)
    expect(second.weights).toEqual(one.weights)
    const evaluations = [one, first, second].map(({ result: { validation } }) => ({ ...validation, seconds: 0 }))
    expect(evaluations[1]).toEqual({ ...evaluations[0], loss: expect.closeTo(evaluations[0].loss, 6) })
    expect(evaluations[2]).toEqual(evaluations[1])
  })

  test('give the same bits on all ranks if their numbers of micro-batches differ', async () => {
    const [first, second, third] = await withReference(reference =>
      onRanks(3, { data: preferencesOf(3, reference), batchSize: 1, record: true }),
    )
    for (const other of [second, third]) {
      expect(other.steps).toEqual(first.steps)
      expect(other.weights).toEqual(first.weights)
    }
  })
})

describe('models with experts on several ranks', () => {
  /** Trains on ranks, each with its experts, with a reference model that is on the same ranks. */
  const withExperts = (
    size: number,
    optionsOf: (reference: ExpertParallel<TokenBatch>, rank: number) => Options,
    { expertParallelSize = size, ...model }: Model & { expertParallelSize?: number } = {},
  ) =>
    local(size, async ranks => {
      const shared = { expertParallelSize }
      const reference = deferWeights(() => new DeepSeek(smallConfig, { seed: 2, backend }))
      const spread = new ExpertParallel(reference, ranks, shared)
      const onRanks = (trainee: DeepSeek) => new ExpertParallel(trainee, ranks, shared)
      try {
        return await rewardSmall(backend, optionsOf(spread, ranks.rank), { deferred: true, onRanks, ...model })
      } finally {
        spread.dispose()
        reference.dispose()
      }
    })
  const close = (value: unknown): unknown => {
    if (typeof value === 'number') return Number.isFinite(value) ? expect.closeTo(value, 3) : value
    if (typeof value !== 'object' || value === null) return value
    if (Array.isArray(value)) return value.map(close)
    return Object.fromEntries(Object.entries(value).map(([name, of]) => [name, close(of)]))
  }
  /** Without what depends on the rows of each micro-batch: the balance loss, and the number of tokens, which counts padding. */
  const learned = (trained: Trained) =>
    numbers(trained).map(({ tokens, metrics: { balance, ...metrics }, ...step }) => ({ ...step, metrics }))

  test.each([
    ['two ranks', 2, 2],
    ['two groups, each with a leader', 4, 2],
  ])('learn from rewards as one rank: %s', async (_, size, expertParallelSize) => {
    const options = (groups: number, reference: ScoringModel): Options => ({
      data: smallRollouts({ groups, validation, updates: 2, kl: { weight: 0.1, reference }, reward: distinctReward }),
      steps: 4,
      evalEvery: 2,
    })
    const one = await withReference(reference => alone(options(8, reference), independent))
    const model = { ...independent, expertParallelSize }
    const found = await withExperts(size, reference => options(8 / size, reference), model)
    expect(learned(found[0])).toEqual(close(learned(one)))
    expect(found[0].weights).toEqual(close(one.weights))
    const { seconds, ...evaluation } = one.result.validation
    for (const other of found) {
      expect(other.steps).toEqual(found[0].steps)
      expect(other.weights).toEqual(found[0].weights)
      expect(other.result.validation).toEqual({ ...(close(evaluation) as object), seconds: expect.any(Number) })
    }
  })

  test('learn from preferences as one rank', async () => {
    const options = (pairs: number, reference: ScoringModel): Options => ({
      data: preferences(preferencePairs, { reference, pairs, validation: preferencePairs.slice(0, 5) }),
      lr: 1e-2,
    })
    const one = await withReference(reference => alone(options(6, reference), independent))
    const found = await withExperts(2, reference => options(3, reference), independent)
    expect(learned(found[0])).toEqual(close(learned(one)))
    expect(found[0].weights).toEqual(close(one.weights))
    const { seconds, ...evaluation } = one.result.validation
    for (const { result } of found)
      expect(result.validation).toEqual({ ...(close(evaluation) as object), seconds: expect.any(Number) })
  })

  test('end on all ranks if the reward function fails, after saving a checkpoint, and resume', async () => {
    const out = await temporaryFolder()
    const whole = await withExperts(2, () => ({}))
    let steps = 0
    const onEvent = (event: TrainEvent) => {
      if (event.type === 'step') steps = event.step
    }
    const usual = smallRollouts()
    const reward: Rollouts['reward'] = (sample, options) => {
      if (steps === 3) throw new Error('no such server')
      return usual.reward(sample, options)
    }
    const failed = withExperts(2, () => ({ data: { ...usual, reward }, out, onEvent }))
    await expect(failed).rejects.toThrow(/failed: no such server/)
    expect(await readdir(join(out, 'checkpoints'))).toEqual(['latest', 'step-000003'])
    const rest = await withExperts(2, () => ({ out, resume: true }))
    expect(numbers(rest[0])).toEqual(numbers(whole[0]).slice(3))
    expect(rest[1].weights).toEqual(whole[1].weights)
  })

  test('stop on all ranks if the leader is interrupted while it samples', async () => {
    const controller = new AbortController()
    const usual = smallRollouts()
    let samples = 0
    const reward: Rollouts['reward'] = (sample, options) => {
      if (++samples === 40) controller.abort()
      return usual.reward(sample, options)
    }
    const runs = await withExperts(2, (_, rank) => ({
      data: { ...usual, reward },
      ...(rank === 0 && { signal: controller.signal }),
    }))
    expect(runs.map(({ result }) => [result.steps, result.stopped])).toEqual(Array(2).fill([1, 'interrupted']))
  })
})

// Reason to skip: no MPI is installed here (Debian: apt-get install openmpi-bin, or mpich).
const installed = launchers()
test.skipIf(installed.length === 0)(
  'processes of mpirun give the same bits as the local communicator',
  async () => {
    const script = fileURLToPath(new URL('./test-rewards.ts', import.meta.url))
    const [first] = await onRanks(2, {})
    const rewards = first.steps.map(({ metrics }) => metrics['reward'])
    for (const launcher of installed) {
      const { reports, errors } = await launch(launcher, 2, [script])
      expect(errors).toBe('')
      const printed = { digest: digestOf(first), rewards, stopped: 'finished' }
      expect(reports).toEqual([0, 1].map(rank => ({ rank, ...printed })))
      const out = await temporaryFolder()
      const failed = await launch(launcher, 2, [script, out])
      expect(failed.code).not.toBe(0)
      expect(failed.reports).toEqual([])
      expect(failed.errors).toContain('failed: no such server')
      expect(await readdir(join(out, 'checkpoints'))).toEqual(['latest', 'step-000003'])
      const [expected] = await local(2, ranks =>
        rewardSmall(backend, {}, { onRanks: model => new ExpertParallel(model, ranks) }),
      )
      const experts = await launch(launcher, 2, [script, '--experts'])
      expect(experts.errors).toBe('')
      expect(experts.reports.map(({ digest }) => digest)).toEqual(Array(2).fill(digestOf(expected)))
    }
  },
  240_000,
)
