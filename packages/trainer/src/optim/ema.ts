/** @file An exponential moving average of the weights (DeepSeek-V3 report, 3.2.2). */
import { checkOptions, emaStep, MoeError, type NamedParameter, type Parameter, shown } from '@moe/core'
import { checkParameters, zeroState } from './optimizer.ts'

/** Options of `Ema`. */
export interface EmaOptions {
  /**
   * Factor by which the contribution of earlier steps decays per step: 0.999 averages about the last thousand steps.
   */
  readonly decay: number
}

/** The problem with a decay, if there is one. */
export const decayProblem = (name: string, decay: unknown): string | undefined =>
  typeof decay === 'number' && decay > 0 && decay < 1
    ? undefined
    : `${name} is ${shown(decay)}, expected a number between 0 and 1, for example 0.999`

interface Slot {
  readonly parameter: Parameter
  readonly average: Parameter
}

/**
 * Exponential moving averages of the trainable f32 parameters. After t updates, the average is sum decay^(t-i) w_i /
 * sum decay^(t-i) over the weights w_i at each `update`; the weights before the first update are not included. Buffers
 * and frozen weights are not averaged.
 */
export class Ema {
  /** Number of updates so far. */
  steps = 0
  readonly #slots: readonly Slot[]
  readonly #decay: number

  /**
   * @param parameters of the model, as `namedParameters` returns them
   * @throws MoeError E_CONFIG, E_OUT_OF_MEMORY
   */
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

  /** Adds the current weights to the averages. Call it after each step. */
  update(): void {
    const attrs = { decay: this.#decay, step: ++this.steps }
    for (const { parameter, average } of this.#slots) average.assign(emaStep(average, parameter, attrs))
  }

  /** Swaps weights and averages: the model contains the averages until this is called again. Nothing is copied. */
  swap(): void {
    for (const { parameter, average } of this.#slots) parameter.swap(average)
  }

  /** Frees the averages. */
  dispose(): void {
    for (const { average } of this.#slots) average.dispose()
  }
}
