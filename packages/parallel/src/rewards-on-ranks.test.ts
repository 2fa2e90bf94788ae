/** @file Ranks of `@moe/trainer` that learn from rewards, or preferences, are one that has the prompts of all. */
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { DeepSeek } from '@moe/deepseek'
import { preferences, type Rollouts, type TrainEvent, type TrainOptions } from '@moe/trainer'
import { describe, expect, test } from 'vitest'
import { local } from './index.ts'
import { launch, launchers } from './mpi/test-launch.ts'
import { prompts, rewardSmall, smallRollouts } from './test-rewards.ts'
import { backend, temporaryFolder } from './test-runs.ts'
import { arrangements, digestOf, smallConfig, type Trained } from './test-training.ts'

/** What runs stay near to; `fn` is told. */
async function withReference<T>(fn: (reference: DeepSeek) => Promise<T>): Promise<T> {
  const reference = new DeepSeek(smallConfig, { seed: 2, backend })
  return fn(reference).finally(() => reference.dispose())
}
type Options = Partial<TrainOptions>
type Model = Parameters<typeof rewardSmall>[2]
const alone = (options: Options, model?: Model) => rewardSmall(backend, options, model)
const onRanks = (size: number, options: Options, model?: Model) =>
  local(size, ranks => rewardSmall(backend, { ...options, ranks }, model))

const validation = prompts.slice(0, 5).map(({ tokens }) => ({ tokens: [9, ...tokens], alike: false }))

const numbers = ({ steps }: Trained) =>
  steps.map(({ metrics: { samplingSeconds, ...metrics }, ...rest }) => ({ ...rest, metrics }))

/** Without what means over micro-batches change, or the order of sums does. */
const plain = { mtp: 0, objective: { balanceWeight: 0 } } satisfies Model

/** Other texts are worth something else, so that each group teaches. */
const unlike = ({ tokens }: { readonly tokens: readonly number[] }) =>
  tokens.reduce((sum, token, t) => sum + Math.sqrt(token + t), 0)

/** What a run tells of held-out prompts. */
const evaluations = (events: readonly TrainEvent[]) =>
  events.flatMap(event => {
    if (event.type !== 'evaluation') return []
    const { seconds, ...rest } = event
    return [rest]
  })

describe('ranks with G groups each', () => {
  test.each<{ given: Parameters<typeof smallRollouts>[0] }>([
    { given: {} },
    { given: { updates: 3, average: 'text' } },
  ])('are one with the groups of all, bit for bit where each has one micro-batch: $given', async ({ given }) => {
    // A text at a time is made, in a row of its own: nothing depends on what else there is.
    const of = (groups: number) => smallRollouts({ reward: unlike, maxTexts: 1, validation, groups, ...given })
    const options = { batchSize: 12, isolate: false, evalEvery: 3 }
    const told: TrainEvent[][] = [[], []]
    const one = await alone({ ...options, data: of(6), onEvent: event => told[0].push(event) }, plain)
    const [first, second] = await local(2, ranks => {
      const onEvent = (event: TrainEvent) => ranks.rank === 1 && told[1].push(event)
      return rewardSmall(backend, { ...options, data: of(3), ranks, onEvent }, plain)
    })
    expect(numbers(first)).toEqual(numbers(one))
    expect(first.weights).toEqual(one.weights)
    expect(second.steps).toEqual(first.steps)
    expect(second.weights).toEqual(first.weights)
    expect(evaluations(told[1])).toEqual(evaluations(told[0]))
    expect(evaluations(told[0])).toHaveLength(2)
    const [started, startedAlone] = [told[1], told[0]].map(events => events.find(event => event.type === 'start'))
    expect(started).toMatchObject({ textsPerStep: 24, settings: startedAlone?.settings })
  })

  test.each<{ name: string; size: number; options?: Options; model?: Model; weight?: number; digits?: number }>([
    { name: 'two', size: 2 },
    { name: 'three, recorded', size: 3, options: { record: true, steps: 10 } },
    { name: 'two, in bf16, recorded', size: 2, options: { record: true, precision: 'bf16' }, digits: 2 },
    { name: 'two, a reference', size: 2, weight: 0.1 },
    // Which tokens are dropped is said of the rows that they share.
    { name: 'two, dropped tokens', size: 2, model: { dropping: { devices: 2, undropped: 0.5 } }, digits: 0 },
  ])('have the same bits, and the texts of one: $name', async ({ size, options = {}, model, weight, digits = 5 }) => {
    const [one, [first, ...others]] = await withReference(async reference => {
      const held = { validation: validation.slice(0, 1) }
      const of = (groups: number) =>
        smallRollouts({ groups, ...held, ...(weight && { kl: { weight, reference }, updates: 2 }) })
      const one = await alone({ ...options, data: of(3 * size) }, model)
      return [one, await onRanks(size, { ...options, data: of(3) }, model)]
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
  })

  test('steps are recorded with the bits of those op by op', async () => {
    const options = { steps: 10, batchSize: 3 }
    const opByOp = await onRanks(2, options)
    const recorded = await onRanks(2, { ...options, record: true })
    expect(recorded.map(numbers)).toEqual(opByOp.map(numbers))
    expect(recorded.map(({ weights }) => weights)).toEqual(opByOp.map(({ weights }) => weights))
  })

  test.each<{ record: boolean; model: Model }>([
    { record: false, model: plain },
    { record: true, model: plain },
    { record: true, model: {} },
  ])('a rank that learns nothing has padding alone: $record $model', async ({ record, model }) => {
    // Of two prompts, one for each rank, the texts of one are all worth the same. They change places.
    const two = [prompts[0], { ...prompts[1], alike: true }]
    const of = (groups: number) => smallRollouts({ groups, maxTexts: 1 }, two)
    const options = { steps: 8, batchSize: 1, record, eps: 1e-5 }
    const one = await alone({ ...options, data: of(2) }, model)
    const [first, second] = await onRanks(2, { ...options, data: of(1) }, model)
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
  })
})

describe('a run of two ranks', () => {
  test('goes on bit for bit, and on one rank with the prompts of both', async () => {
    const out = await temporaryFolder()
    const [straight] = await onRanks(2, {})
    await onRanks(2, { out, checkpointEvery: 2, keepCheckpoints: 9 })
    const resume = join(out, 'checkpoints', 'step-000002')
    const again = { out, resume, keepCheckpoints: 9 }
    const [first, second] = await onRanks(2, again)
    expect(numbers(first)).toEqual(numbers(straight).slice(2))
    expect(first.weights).toEqual(straight.weights)
    expect(second.weights).toEqual(straight.weights)
    const one = await alone({ ...again, data: smallRollouts({ groups: 6 }) })
    expect(one.steps.map(({ step }) => step)).toEqual([3, 4, 5, 6])
    expect(one.steps[0].metrics['reward']).toBeCloseTo(straight.steps[2].metrics['reward'], 12)
    await expect(alone(again)).rejects.toThrow(/data: saved with 7 prompts .*"groups":6,.* now 7 prompts .*"groups":3,/)
  })

  test('ends on both where a reward fails on one, saved', async () => {
    const out = await temporaryFolder()
    const [whole] = await onRanks(2, {})
    let steps = 0
    let saved = false
    const told = await local(2, ranks => {
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
          // A process that ends with an error would take the one that saves along.
          expect(saved).toBe(true)
          return error
        },
      )
    })
    for (const error of told) expect(error).toMatchObject({ code: 'E_DATA', op: 'reward' })
    expect(told[1].message).toMatch(
      /^reward: the reward of a text of \d tokens, "" failed: no such server; catch errors/,
    )
    expect(told[1].cause.message).toBe('no such server')
    expect(told[0].message).toMatch(/^reward: on rank 1: the reward of a text of \d tokens, "" failed: no such server;/)
    expect(await readdir(join(out, 'checkpoints'))).toEqual(['latest', 'step-000003'])
    const [rest] = await onRanks(2, { out, resume: true })
    expect(numbers(rest)).toEqual(numbers(whole).slice(3))
    expect(rest.weights).toEqual(whole.weights)
  })

  test.each(['texts', 'held-out texts'])(
    'that is interrupted on one while %s are judged stops on both',
    async where => {
      const controller = new AbortController()
      let ended = 0
      const told: TrainEvent[] = []
      const runs = await local(2, ranks => {
        const usual = smallRollouts({ validation })
        const reward: Rollouts['reward'] = (sample, options) => {
          const held = validation.includes(sample.prompt as (typeof validation)[number])
          const due = where === 'texts' ? !held && steps === 2 : held
          if (ranks.rank === 0 || !due) return usual.reward(sample, options)
          // Never tells.
          options.signal.addEventListener('abort', () => ended++)
          setTimeout(() => controller.abort())
          return new Promise(() => {})
        }
        let steps = 0
        const onEvent = (event: TrainEvent) => {
          told.push(event)
          if (event.type === 'step') steps = event.step
        }
        const signal = ranks.rank === 1 ? { signal: controller.signal } : {}
        return rewardSmall(backend, { data: { ...usual, reward }, ranks, evalEvery: 4, onEvent, ...signal })
      })
      const steps = where === 'texts' ? 2 : 4
      expect(runs.map(({ result }) => [result.steps, result.stopped])).toEqual(Array(2).fill([steps, 'interrupted']))
      expect(ended).toBeGreaterThan(0)
      expect(evaluations(told)).toEqual([])
      expect(runs[0].weights).toEqual(runs[1].weights)
    },
  )

  test('that is late on one stops on both behind whole updates', async () => {
    const runs = await local(2, ranks => {
      const late = ranks.rank === 1 ? { timeLimitSeconds: 1e-9 } : {}
      return rewardSmall(backend, { data: smallRollouts({ updates: 3 }), ranks, ...late })
    })
    expect(runs.map(({ result }) => [result.steps, result.stopped])).toEqual(Array(2).fill([3, 'time']))
  })

  test('does not begin with other prompts, or as parts of a model', async () => {
    const different = local(2, ranks =>
      rewardSmall(backend, { ranks, data: smallRollouts({ groups: 3 + ranks.rank }) }),
    )
    await expect(different).rejects.toThrow(
      /data is 7 prompts .*"groups":6,.* on rank 0 but 7 prompts .*"groups":8,.* on rank 1/,
    )
    for (const [onRanks, name] of [
      [arrangements.stages.onRanks, 'a Pipeline'],
      [arrangements.experts.onRanks, 'an ExpertParallel'],
    ] as const) {
      const parts = local(2, ranks => rewardSmall(backend, {}, { onRanks: model => onRanks(model, ranks) }))
      await expect(parts).rejects.toThrow(`ranks is ${name}, but rollouts need the whole model on every rank`)
    }
  })
})

describe('preferences', () => {
  const pairs = Array.from({ length: 9 }, (_, i) => ({
    tokens: [3, 4 + i],
    chosen: [...Array(i + 1).fill(5 + i), 1],
    rejected: [20 + i, 21, 1],
  }))
  const of = (count: number, reference: DeepSeek) =>
    preferences(pairs, { reference, pairs: count, validation: pairs.slice(0, 5) })

  test('are learned on two ranks as on one with the pairs of both', async () => {
    const options = { isolate: false, batchSize: 6, lr: 1e-2 }
    const [one, [first, second]] = await withReference(async reference => [
      await alone({ ...options, data: of(6, reference) }, plain),
      await onRanks(2, { ...options, data: of(3, reference) }, plain),
    ])
    expect(first.steps).toEqual(one.steps)
    expect(first.weights).toEqual(one.weights)
    expect(second.weights).toEqual(one.weights)
    const measured = [one, first, second].map(({ result: { validation } }) => ({ ...validation, seconds: 0 }))
    expect(measured[1]).toEqual({ ...measured[0], loss: expect.closeTo(measured[0].loss, 6) })
    expect(measured[2]).toEqual(measured[1])
  })

  test('have the same bits on ranks with other numbers of micro-batches', async () => {
    const [first, second, third] = await withReference(reference =>
      onRanks(3, { data: of(3, reference), batchSize: 1, record: true }),
    )
    for (const other of [second, third]) {
      expect(other.steps).toEqual(first.steps)
      expect(other.weights).toEqual(first.weights)
    }
  })
})

// Reason to skip: no MPI is installed here (Debian: apt-get install openmpi-bin, or mpich).
const installed = launchers()
test.skipIf(installed.length === 0)(
  'processes of mpirun have the bits of the local communicator',
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
    }
  },
  240_000,
)
