/** @file An exponential moving average of weights: what they are worth once the learning rate has fallen, seen before it has (DeepSeek-V3 report, 3.2.2). */
import { checkOptions, emaStep, MoeError, type NamedParameter, type Parameter, shown } from '@moe/core'
import { checkParameters, zeroState } from './optimizer.ts'

/** How long averages remember. */
export interface EmaOptions {
  /** What the weights of a step tokenWeights of those of the next: 0.999 looks back over some thousand steps. */
  readonly decay: number
}

/** What is wrong with such a decay, if anything is. */
export const decayProblem = (name: string, decay: unknown): string | undefined =>
  typeof decay === 'number' && decay > 0 && decay < 1
    ? undefined
    : `${name} is ${shown(decay)}, needs a number between 0 and 1, such as 0.999`

interface Slot {
  readonly parameter: Parameter
  readonly average: Parameter
}

/**
 * Averages of the trainable parameters, f32 where these are. They are of the weights after each `update` alone: those of t steps are sum decay^(t-i) w_i / sum decay^(t-i), not of what the weights were before
 * the first. Others (buffers, frozen weights) have none.
 */
export class Ema {
  /** Steps whose weights are in the averages. */
  steps = 0
  readonly #slots: readonly Slot[]
  readonly #decay: number

  /** @param parameters of the model, as `namedParameters` gives them. @throws MoeError E_CONFIG, E_OUT_OF_MEMORY */
  constructor(parameters: readonly NamedParameter[], options: EmaOptions) {
    checkParameters('Ema', parameters)
    checkOptions('Ema', options, { decay: true })
    const problem = decayProblem('decay', options.decay)
    if (problem !== undefined)
      throw new MoeError({ code: 'E_CONFIG', op: 'Ema', problem, fix: 'pass { decay: 0.999 }' })
    this.#decay = options.decay
    const trained = parameters.map(({ parameter }) => parameter).filter(({ trainable }) => trainable)
    this.#slots = zeroState(trained).map((average, i) => ({ parameter: trained[i], average }))
  }

  /** Takes the weights in as they are: to be called after each step. */
  update(): void {
    const attrs = { decay: this.#decay, step: ++this.steps }
    for (const { parameter, average } of this.#slots) average.assign(emaStep(average, parameter, attrs))
  }

  /** Exchanges weights and averages: the model is the average one until this is called again. Nothing is copied. */
  exchange(): void {
    for (const { parameter, average } of this.#slots) parameter.exchange(average)
  }

  /** Frees the averages. */
  dispose(): void {
    for (const { average } of this.#slots) average.dispose()
  }
}
