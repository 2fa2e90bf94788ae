/** @file The averaged weights of a run, as the whole model that they are. */
import type { NamedParameter } from '@moe/core'
import type { ModelOnRanks } from './model-on-ranks.ts'
import { Ema } from './optim/ema.ts'

/** Averages of what this rank trains; with those of the others they are a model. */
export class Averages {
  readonly #ema: Ema
  readonly #onRanks: ModelOnRanks | undefined

  /** @param onRanks where each rank has a part of the model */
  constructor(parameters: readonly NamedParameter[], decay: number, onRanks: ModelOnRanks | undefined) {
    this.#ema = new Ema(onRanks?.parameters ?? parameters, { decay })
    this.#onRanks = onRanks
  }

  /** Steps whose weights are in them. */
  get steps(): number {
    return this.#ema.steps
  }

  /** After each step. */
  update(): void {
    this.#ema.update()
  }

  /** Runs `fn` while the model's weights are the averages. All ranks call it, and have the whole model then and afterwards. */
  async during<T>(fn: () => Promise<T>): Promise<T> {
    this.#exchange()
    try {
      await this.#onRanks?.gather()
      return await fn()
    } finally {
      this.#exchange()
      await this.#onRanks?.gather()
    }
  }

  /** Takes the weights of the model, which is whole, for averages over `steps` steps. All ranks call it. The model is to be filled anew. */
  async take(steps: number): Promise<void> {
    this.#exchange()
    this.#ema.steps = steps
    await this.#onRanks?.gather()
  }

  #exchange(): void {
    this.#onRanks?.release()
    this.#ema.exchange()
  }

  dispose(): void {
    this.#ema.dispose()
  }
}
