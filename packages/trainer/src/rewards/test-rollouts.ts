/** @file For tests: runs of a small model that learns from rollouts. */
import { disposeModule } from '@moe/core'
import type { StepEvent, TrainEvent } from '../events.ts'
import type { TrainOptions } from '../options.ts'
import { TalkingBigram } from '../test-model.ts'
import { train } from '../train.ts'
import { type RolloutOptions, rollouts } from './rollouts.ts'

export const prompts = [1, 2, 3, 4, 5].map(token => ({ tokens: [10, token] }))

/** A reward function: the fraction of tokens that are 7. */
export const sevens = ({ tokens }: { readonly tokens: readonly number[] }) =>
  tokens.filter(token => token === 7).length / tokens.length

export const fewRollouts = { reward: sevens, groups: 4, groupSize: 6, maxTokens: 5 } satisfies RolloutOptions

export const settings = {
  steps: 8,
  batchSize: 4,
  sequenceLength: 12,
  lr: 0.05,
  seed: 3,
  weightDecay: 0,
  progress: false,
} as const

export interface RolloutRun {
  readonly steps: readonly StepEvent[]
  readonly events: readonly TrainEvent[]
  readonly sampledTexts: ReadonlyArray<readonly number[]>
  readonly table: readonly number[][]
}

/** Trains a new model, which is disposed of afterwards. */
export async function run(
  rolloutOptions: Partial<RolloutOptions> = {},
  options: Partial<TrainOptions> = {},
  model = new TalkingBigram(),
): Promise<RolloutRun> {
  const events: TrainEvent[] = []
  try {
    const data = rollouts(prompts, { ...fewRollouts, ...rolloutOptions })
    await train(model, { ...settings, data, onEvent: event => events.push(event), ...options })
    const steps = events.filter(event => event.type === 'step')
    return { steps, events, sampledTexts: model.sampledTexts, table: await model.table() }
  } finally {
    disposeModule(model)
  }
}

/** The events of all steps, without their times. */
export const numbers = ({ steps }: RolloutRun) =>
  steps.map(({ tokensPerSecond, metrics: { samplingSeconds, ...metrics }, ...rest }) => ({ ...rest, metrics }))

/** The fields of the error that a promise rejects with. */
export const errorOf = async (promise: Promise<unknown>) => {
  const error = await promise.then(
    () => undefined,
    error => error,
  )
  return { code: error?.code, message: `${error?.message}`, cause: error?.cause }
}
