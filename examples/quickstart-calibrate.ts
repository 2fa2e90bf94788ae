/** @file How many training steps fit into a given time on this machine: measured on a model that is thrown away. */
import { backward, type Precision, Random, scope, withPrecision } from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput } from '@moe/deepseek'

export interface Calibration {
  readonly batchSize: number
  readonly sequenceLength: number
  readonly precision: Precision
  /** Time for all of the training. */
  readonly seconds: number
}

/** Steps that fit, between 20 and 3000, with a tenth of the time in reserve for the optimizer and for a machine that gets busier. */
export async function stepsThatFit(config: DeepSeekConfigInput, options: Calibration): Promise<number> {
  const { batchSize: rows, sequenceLength, precision, seconds } = options
  const model = new DeepSeek(config)
  const length = sequenceLength + model.lookahead
  const random = new Random(0)
  const batch = {
    tokens: Int32Array.from({ length: rows * length }, () => random.integer(model.vocabSize)),
    documents: new Int32Array(rows * length),
    rows,
    length,
  }
  const times: number[] = []
  for (let i = 0; i < 6; i++) {
    const start = performance.now()
    scope(() => withPrecision(precision, () => backward(model.loss(batch).loss)))
    await model.backend.sync()
    await model.afterStep()
    times.push(performance.now() - start)
  }
  model.dispose()
  const median = times.slice(1).sort((a, b) => a - b)[2] / 1000
  return Math.max(20, Math.min(3000, Math.floor((0.9 * seconds) / median)))
}
