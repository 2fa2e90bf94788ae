/** @file Determines how many training steps fit into a given time on this machine, by timing a few steps of a throwaway model. */
import { type Precision, Random } from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput } from '@moe/deepseek'
import { TokenDataset, type TrainOptions, train } from '@moe/trainer'

export interface Calibration {
  readonly batchSize: number
  readonly sequenceLength: number
  readonly precision: Precision
  readonly optimizer: TrainOptions['optimizer']
  /** Time available for the whole training. */
  readonly seconds: number
}

/** A model of this size learns little from more steps, so a fast machine finishes early instead. */
const mostSteps = 800

/** Returns the number of steps that fit, with a tenth of the time in reserve in case the machine gets busier. */
export async function stepsThatFit(config: DeepSeekConfigInput, options: Calibration): Promise<number> {
  const { seconds, ...settings } = options
  const model = new DeepSeek(config)
  const random = new Random(0)
  const steps = 8
  const tokens = Int32Array.from({ length: 2 * steps * settings.batchSize * settings.sequenceLength }, () =>
    random.integer(model.vocabSize),
  )
  const times: number[] = []
  let last = performance.now()
  await train(model, {
    ...settings,
    data: { training: TokenDataset.fromTokens([tokens]) },
    steps,
    progress: false,
    handleSignals: false,
    onEvent: event => {
      if (event.type !== 'step') return
      times.push(performance.now() - last)
      last = performance.now()
    },
  })
  model.dispose()
  // The first step warms up caches and compilers.
  const sorted = times.slice(1).sort((a, b) => a - b)
  const median = sorted[Math.floor(sorted.length / 2)] / 1000
  return Math.max(20, Math.min(mostSteps, Math.floor((0.9 * seconds) / median)))
}
