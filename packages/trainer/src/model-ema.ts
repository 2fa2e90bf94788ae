/** @file The exponential moving average of a run's weights, as a complete model. */
import type { NamedParameter } from '@moe/core'
import type { ModelOnRanks } from './model-on-ranks.ts'
import { Ema } from './optim/ema.ts'

/** Averages what this rank trains. Together with those of the other ranks, the averages form the complete model. */
export class ModelEma {
  readonly #ema: Ema
  readonly #onRanks: ModelOnRanks | undefined

  /** @param onRanks if each rank trains a part of the model */
  constructor(parameters: readonly NamedParameter[], decay: number, onRanks: ModelOnRanks | undefined) {
    this.#ema = new Ema(onRanks?.parameters ?? parameters, { decay })
    this.#onRanks = onRanks
  }

  /** Number of steps whose weights are averaged. */
  get steps(): number {
    return this.#ema.steps
  }

  /** Adds the current weights to the average. Call it after each step. */
  update(): void {
    this.#ema.update()
  }

  /**
   * Runs `fn` while the model contains the averaged weights. All ranks must call it; each has the complete model during
   * `fn` and afterwards.
   */
  async withAverages<T>(fn: () => Promise<T>): Promise<T> {
    this.#swap()
    try {
      await this.#onRanks?.gather()
      return await fn()
    } finally {
      this.#swap()
      await this.#onRanks?.gather()
    }
  }

  /**
   * Takes the weights of the (complete) model as the average over `steps` steps. All ranks must call it. The model must
   * be filled with its own weights afterwards.
   */
  async restore(steps: number): Promise<void> {
    this.#swap()
    this.#ema.steps = steps
    await this.#onRanks?.gather()
  }

  #swap(): void {
    this.#onRanks?.release()
    this.#ema.swap()
  }

  dispose(): void {
    this.#ema.dispose()
  }
}
