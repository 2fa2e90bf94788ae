/** @file Reinforcement learning of a DeepSeek with experts and an MTP module, on a backend that can record. */
import { join } from 'node:path'
import { namedParameters } from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, afterEach, expect, test } from 'vitest'
import { latestCheckpoint } from '../checkpoints/checkpoint-folder.ts'
import { modelFolder } from '../checkpoints/model-folder.ts'
import type { StepEvent, TrainEvent } from '../events.ts'
import type { TrainOptions } from '../options.ts'
import { smallConfig } from '../test-deepseek.ts'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { evaluateRewards } from './evaluate-rewards.ts'
import { type RolloutOptions, rollouts } from './rollouts.ts'
import type { SamplingModel } from './sampler.ts'

const backend = await createBackend()
afterAll(() => backend.dispose())
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

const tiny: DeepSeekConfigInput = { ...smallConfig, initializer_range: 0.1, eos_token_id: 1 }

const prompts = Array.from({ length: 12 }, (_, i) => ({
  tokens: Array.from({ length: 3 + (i % 5) }, (_, t) => 2 + (((i + 1) * (t + 3)) % 38)),
}))

const small = {
  reward: ({ tokens }) => tokens.filter(token => token === 7).length / tokens.length,
  groups: 4,
  groupSize: 8,
  maxTokens: 6,
} satisfies RolloutOptions

async function run(rolloutOptions: Partial<RolloutOptions> = {}, options: Partial<TrainOptions> = {}) {
  const model = new DeepSeek(tiny, { backend }) satisfies SamplingModel
  const steps: StepEvent[] = []
  const data = rollouts(prompts, { ...small, ...rolloutOptions })
  try {
    const settings = { data, steps: 12, batchSize: 4, sequenceLength: 16, lr: 0.02, weightDecay: 0, progress: false }
    const onEvent = (event: TrainEvent) => event.type === 'step' && steps.push(event)
    const result = await train(model, { ...settings, onEvent, ...options })
    const weights = await Promise.all(namedParameters(model).map(({ parameter }) => parameter.values()))
    return { steps, result, weights }
  } finally {
    model.dispose()
  }
}

const numbers = ({ steps }: { readonly steps: readonly StepEvent[] }) =>
  steps.map(({ tokensPerSecond, metrics: { samplingSeconds, ...metrics }, ...rest }) => ({ ...rest, metrics }))

test('learns to generate token 7 within a few steps', async () => {
  const { steps } = await run({}, { steps: 30 })
  const rewards = steps.map(({ metrics }) => metrics['reward'])
  expect(rewards[0]).toBeLessThan(0.1)
  expect(rewards[29]).toBeGreaterThan(0.7)
  const { mtp, samplerKl, maxVio } = steps[29].metrics
  // MTP modules continue to learn what the model generates.
  expect(mtp).toBeLessThan(steps[0].metrics['mtp'])
  expect(samplerKl).toBeLessThan(1e-6)
  expect(maxVio).toBeGreaterThan(0)
})

test.each([1, 2])('recorded steps give the same bits as op by op, %i updates', async updates => {
  const recorded = await run({ updates })
  const opByOp = await run({ updates }, { record: false })
  expect(numbers(recorded)).toEqual(numbers(opByOp))
  expect(recorded.weights).toEqual(opByOp.weights)
})

test('an interrupted run resumes bit for bit', async () => {
  const uninterrupted = await run({ updates: 2 })
  const out = join(await temporaryFolder(), 'run')
  const controller = new AbortController()
  const onEvent = (event: TrainEvent) => {
    if (event.type === 'step' && event.step === 5) controller.abort()
  }
  const { result } = await run({ updates: 2 }, { out, signal: controller.signal, onEvent })
  expect(result.steps).toBe(6)
  const rest = await run({ updates: 2 }, { out, resume: true })
  expect(numbers(rest)).toEqual(numbers(uninterrupted).slice(6))
  expect(rest.weights).toEqual(uninterrupted.weights)
})

test('the EMA is evaluated next to the weights, and changes nothing', async () => {
  const given = { updates: 2, validation: prompts.slice(0, 3) }
  const plain = await run(given, { evalEvery: 4 })
  const out = join(await temporaryFolder(), 'run')
  const { result, ...averaged } = await run(given, { evalEvery: 4, ema: 0.5, out })
  expect(numbers(averaged)).toEqual(numbers(plain))
  expect(averaged.weights).toEqual(plain.weights)
  expect(result.validation.reward).toBe(plain.result.validation.reward)
  const model = await DeepSeek.fromPretrained(modelFolder(out, { ema: true }), { backend })
  const { reward, loss } = await evaluateRewards(model, rollouts(prompts, { ...small, ...given }))
  model.dispose()
  expect(result.ema?.reward).toBe(reward)
  expect(result.ema?.loss).toBeCloseTo(loss, 5)
  expect(result.ema?.loss).not.toBe(result.validation.loss)
})

test('a reward that fails in an evaluation saves the weights, but not the EMA in their place', async () => {
  const validation = prompts.slice(0, 3)
  /** The steps of the checkpoints after the reward of held-out text number `failing` failed. */
  const saved = async (failing: number) => {
    const out = join(await temporaryFolder(), 'run')
    let judged = 0
    const reward: RolloutOptions['reward'] = sample => {
      if (validation.includes(sample.prompt as (typeof validation)[number]) && judged++ === failing)
        throw new Error('no server')
      return small.reward(sample)
    }
    const given = { reward, validation, maxTexts: 1 }
    const training = prompts.slice(3)
    await expect(
      run(given, { data: rollouts(training, { ...small, ...given }), evalEvery: 4, ema: 0.5, out }),
    ).rejects.toThrow('no server')
    return latestCheckpoint(out)?.slice(-'step-000004'.length)
  }
  // The first evaluation judges three texts of the weights and three of the EMA.
  expect(await saved(7)).toBe('step-000008')
  expect(await saved(4)).toBeUndefined()
})

test('stays close to a reference model, which needs no MTP modules', async () => {
  const reference = new DeepSeek({ ...tiny, num_nextn_predict_layers: 0 }, { backend })
  const near = await run({ kl: { weight: 3, reference }, updates: 2 })
  const far = await run({ kl: { weight: 1e-3, reference }, updates: 2 })
  reference.dispose()
  // The reference has the same weights, except for MTP.
  expect(near.steps[0].metrics['kl']).toBeLessThan(1e-6)
  expect(near.steps[11].metrics['kl']).toBeLessThan(0.5 * far.steps[11].metrics['kl'])
})
