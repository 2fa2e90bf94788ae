/** @file The exponential moving average of a run's weights, as a complete model. */
import { type NamedParameter, ParameterShard } from '@moe/core'
import type { ModelOnRanks } from './model-on-ranks.ts'
import { Ema } from './optim/ema.ts'
import { canShard, type Ranks } from './ranks.ts'

/** The ranks of a run, as options of `train` resolve to. */
interface RunRanks {
  readonly ranks?: Ranks | undefined
  /** Set if each rank trains a part of the model. */
  readonly onRanks?: ModelOnRanks | undefined
}

/**
 * Averages the weights that this rank trains, or its shard of them if several ranks have the whole model. Together with
 * those of the other ranks, the averages form the complete model.
 */
export class ModelEma {
  readonly #ema: Ema
  readonly #onRanks: ModelOnRanks | undefined
  /**
   * The shard of a model that all ranks have. Not that of the optimizer, whose row ranges recorded steps keep at their
   * addresses.
   */
  readonly #shard: ParameterShard | undefined
  /** Whether the model contains the averaged weights, during `withAverages`. */
  isInModel = false

  constructor(parameters: readonly NamedParameter[], decay: number, { ranks, onRanks }: RunRanks = {}) {
    this.#onRanks = onRanks
    if (onRanks === undefined && ranks !== undefined && ranks.size > 1 && canShard(ranks))
      this.#shard = new ParameterShard(parameters, ranks)
    this.#ema = new Ema((onRanks ?? this.#shard)?.parameters ?? parameters, { decay })
  }

  /** Number of steps whose weights are averaged. */
  get steps(): number {
    return this.#ema.steps
  }

  /** Adds the current weights to the average. Call it after each step. */
  update(): void {
    this.#shard?.takeRows()
    this.#ema.update()
    this.#shard?.freeRows()
  }

  /**
   * Runs `fn` while the model contains the averaged weights; before the first step, its own weights. All ranks must call
   * it.
   */
  async withAverages<T>(fn: () => Promise<T>): Promise<T> {
    if (this.steps === 0) return await fn()
    this.#swap()
    this.isInModel = true
    try {
      await this.#synchronize()
      return await fn()
    } finally {
      this.#swap()
      this.isInModel = false
      await this.#synchronize()
    }
  }

  /**
   * Takes the weights of the model as the average over `steps` steps. All ranks must call it. The model must be filled
   * with its own weights afterwards.
   */
  async restore(steps: number): Promise<void> {
    this.#swap()
    this.#ema.steps = steps
    await this.#synchronize()
  }

  #swap(): void {
    this.#onRanks?.release()
    this.#shard?.takeAll()
    this.#ema.swap()
  }

  async #synchronize(): Promise<void> {
    await this.#onRanks?.synchronize()
    await this.#shard?.gather()
    this.#shard?.freeRows()
  }

  dispose(): void {
    this.#shard?.freeRows()
    this.#ema.dispose()
  }
}
