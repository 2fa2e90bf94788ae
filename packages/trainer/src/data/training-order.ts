/**
 * @file Which rows a training step sees: a function of the step number alone, so that nothing but that number need be
 * saved.
 */
import { checkOptions, MoeError, type OptionNames, Random, shown } from '@moe/core'
import type { TokenBatch } from '../model.ts'
import { batchOf, type Rows, rowsOf } from './rows.ts'
import type { TokenDataset } from './token-dataset.ts'

/** A number of micro-batches, or one for every step (counted from 0), rounded to whole ones: a batch that grows, as `piecewise` has it. */
export type MicroBatches = number | ((step: number) => number)

/** The micro-batches of a step. @throws MoeError E_CONFIG */
export function microBatchesAt(accumulate: MicroBatches, step: number): number {
  if (typeof accumulate === 'number') return accumulate
  const value = accumulate(step)
  const count = Math.round(value)
  if (Number.isSafeInteger(count) && count >= 1) return count
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'TrainingOrder',
    problem: `accumulate(${step}) is ${shown(value)}`,
    fix: 'give a number of micro-batches, 1 or more, for every step',
  })
}

/** Sizes of a step, and which share of it is this process's. */
export interface OrderOptions {
  /** Positions trained on per row. */
  readonly sequenceLength: number
  /** Tokens that a row has beyond that; `TrainableModel.lookahead`. */
  readonly lookahead: number
  /** Rows of a micro-batch, on each rank. */
  readonly batchSize: number
  /**
   * Whether batches say where each document begins (`TokenBatch.starts`), so that none is seen from another; examples share rows then. For models that say
   * `isolates`. Default false.
   */
  readonly isolate?: boolean
  /** Micro-batches of a step, or a function of the steps before it. Default 1. */
  readonly accumulate?: MicroBatches
  /** Names the order. Default 0. */
  readonly seed?: number
  /**
   * This process among those that share the work; together the ranks see what one process with a `batchSize` larger by
   * `world` sees. Default 0 of 1.
   */
  readonly rank?: number
  /** Processes that share the work. */
  readonly world?: number
}

const names: OptionNames<OrderOptions> = {
  sequenceLength: true,
  lookahead: true,
  batchSize: true,
  isolate: true,
  accumulate: true,
  seed: true,
  rank: true,
  world: true,
}

/**
 * Windows of `sequenceLength` positions, each once an epoch, in an order drawn anew for every epoch. Window w starts
 * at token `w * sequenceLength`, so that every token of the stream but the first is predicted once an epoch; of examples, each is a window, or
 * shares one. What a window has no tokens for is filled up with padding.
 */
export class TrainingOrder {
  /** The stream that windows are cut from. */
  readonly data: TokenDataset
  /** Positions trained on per row. */
  readonly sequenceLength: number
  /** Tokens that a row has beyond that. */
  readonly lookahead: number
  /** Rows of a micro-batch, on each rank. */
  readonly batchSize: number
  /** Micro-batches of a step. */
  readonly accumulate: MicroBatches
  /** Names the order. */
  readonly seed: number
  /** This process among those that share the work, from 0. */
  readonly rank: number
  /** Processes that share the work. */
  readonly world: number
  /** Windows of an epoch. */
  readonly windows: number
  /** Whether batches say where each document begins. */
  readonly isolate: boolean
  readonly #rows: Rows
  readonly #orders = new Map<number, Uint32Array>()
  /** Where `accumulate` is a function: micro-batches before each step, as far as they were asked for. */
  readonly #before = [0]

  /** @throws MoeError E_CONFIG for sizes that are not whole numbers from 1, or a rank outside the world; E_DATA where no example has something to learn in so many positions */
  constructor(data: TokenDataset, options: OrderOptions) {
    checkOptions('TrainingOrder', options, names)
    const { sequenceLength, lookahead, batchSize, accumulate = 1, seed = 0, rank = 0, world = 1 } = options
    const { isolate = false } = options
    const micro = typeof accumulate === 'function' ? 1 : accumulate
    const sizes = { sequenceLength, lookahead, batchSize, accumulate: micro, world }
    const wrong = Object.entries(sizes).filter(([, size]) => !Number.isSafeInteger(size) || size < 1)
    if (wrong.length > 0 || !Number.isSafeInteger(rank) || rank < 0 || rank >= world) {
      const problems = wrong.map(([name, size]) => `${name} is ${size}`)
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'TrainingOrder',
        problem: problems.length > 0 ? problems.join(', ') : `rank is ${rank} of ${world}`,
        fix: problems.length > 0 ? 'sizes are whole numbers from 1' : 'ranks count from 0',
      })
    }
    this.data = data
    this.sequenceLength = sequenceLength
    this.lookahead = lookahead
    this.batchSize = batchSize
    this.accumulate = accumulate
    this.seed = seed
    this.rank = rank
    this.world = world
    this.isolate = isolate
    this.#rows = rowsOf(data, sequenceLength, isolate)
    this.windows = this.#rows.count
    if (this.windows === 0) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'TrainingOrder',
        problem: `none of ${data.documents} examples has something to learn in its first ${sequenceLength} positions`,
        fix: `a sequenceLength of ${data.longest} holds the longest`,
      })
    }
  }

  /** Windows of the first `steps` steps, over all micro-batches and ranks. */
  windowsIn(steps: number): number {
    return this.#microBatchesIn(steps) * this.batchSize * this.world
  }

  /** Positions of the first `steps` steps on this rank. */
  tokensIn(steps: number): number {
    return this.#microBatchesIn(steps) * this.batchSize * this.sequenceLength
  }

  /** Epochs, whole and begun, that the first `steps` steps go through. */
  epochs(steps: number): number {
    return this.windowsIn(steps) / this.windows
  }

  #microBatchesIn(steps: number): number {
    if (typeof this.accumulate === 'number') return steps * this.accumulate
    const before = this.#before
    for (let step = before.length - 1; step < steps; step++)
      before.push(before[step] + microBatchesAt(this.accumulate, step))
    return before[steps]
  }

  /** Number of the window that is seen at place `index` of the endless sequence of windows. */
  windowAt(index: number): number {
    const epoch = Math.floor(index / this.windows)
    return this.#order(epoch)[index - epoch * this.windows]
  }

  /** The micro-batches of a step (counted from 0) on this rank. */
  step(step: number): TokenBatch[] {
    const rows = this.batchSize * this.world
    const before = this.windowsIn(step)
    return Array.from({ length: microBatchesAt(this.accumulate, step) }, (_, micro) => {
      const first = before + micro * rows + this.rank * this.batchSize
      return this.#batch(first)
    })
  }

  #batch(first: number): TokenBatch {
    const rows = Array.from({ length: this.batchSize }, (_, row) => this.#rows.row(this.windowAt(first + row)))
    return batchOf(this.data, rows, this.sequenceLength + this.lookahead, this.isolate)
  }

  #order(epoch: number): Uint32Array {
    let order = this.#orders.get(epoch)
    if (order === undefined) {
      order = new Random(this.seed)
        .fork(`epoch ${epoch}`)
        .shuffle(Uint32Array.from({ length: this.windows }, (_, i) => i))
      // A batch may reach over the end of an epoch, so two are kept.
      for (const old of this.#orders.keys()) if (old < epoch - 1) this.#orders.delete(old)
      this.#orders.set(epoch, order)
    }
    return order
  }
}
