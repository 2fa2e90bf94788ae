/**
 * @file Which rows a training step gets: a function of the step number alone. Only a run whose sizes change must know how
 *   many rows it has taken.
 */
import { checkOptions, MoeError, type OptionNames, Random, shown } from '@moe/core'
import type { TokenBatch } from '../model.ts'
import { EpochOrder } from './epoch-order.ts'
import { longestExample } from './examples.ts'
import { Interleaving } from './interleaving.ts'
import { batchOfSources, type Rows, rowsOf, type SourceRow } from './rows.ts'
import { type Mixture, type Source, sourcesOf } from './token-data.ts'
import type { TokenStream } from './token-stream.ts'

/**
 * A number of micro-batches per step, or a function of the step (counted from 0) whose result is rounded, for a batch
 * size that grows: `piecewise`.
 */
export type MicroBatches = number | ((step: number) => number)

/** The number of micro-batches of a step. @throws MoeError E_CONFIG */
export function microBatchesAt(accumulate: MicroBatches, step: number): number {
  if (typeof accumulate === 'number') return accumulate
  const value = accumulate(step)
  const count = Math.round(value)
  if (Number.isSafeInteger(count) && count >= 1) return count
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'TrainingOrder',
    problem: `accumulate(${step}) is ${shown(value)}`,
    fix: 'return a number of at least 1 for every step',
  })
}

/** Options of `TrainingOrder`. */
export interface OrderOptions {
  /** Trained positions per row. */
  readonly sequenceLength: number
  /** Tokens that a row has beyond that: `TrainableModel.lookahead`. */
  readonly lookahead: number
  /** Rows per micro-batch, on each rank. */
  readonly batchSize: number
  /**
   * Whether batches contain the start of each token's document (`TokenBatch.starts`), so that attention can be
   * restricted to it. Examples are then packed into shared rows. For models that declare `isolates`. Default false.
   */
  readonly isolate?: boolean | undefined
  /** Micro-batches per step, or a function of the step. Default 1. */
  readonly accumulate?: MicroBatches | undefined
  /** Seed of the order. Default 0. */
  readonly seed?: number | undefined
  /**
   * Index of this process among those that share the data. Together, the ranks get the rows that a single process with
   * a `batchSize` larger by `world` gets. Default 0 of 1.
   */
  readonly rank?: number | undefined
  /** Number of processes that share the data. */
  readonly world?: number | undefined
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

/** How far steps have gone through a source. */
export interface SourceProgress extends Source {
  /** Rows taken, over all micro-batches and ranks. */
  readonly windows: number
  /** Number of passes over the source. */
  readonly epochs: number
}

/** A source with its rows and their order. */
interface OrderedSource extends Source {
  readonly rows: Rows
  readonly order: EpochOrder
}

/**
 * The order of training rows. Rows are windows of `sequenceLength` positions; each is used once per epoch, in an order
 * that is shuffled again for every epoch. Window w starts at token `w * sequenceLength`, so that every token but the
 * first is predicted once per epoch. For examples, each row contains one example, or several if packed. Rows are filled
 * up with padding. Each source of a `mixture` has its own order and epochs.
 */
export class TrainingOrder {
  /** The data that rows are taken from. */
  readonly data: TokenStream | Mixture
  /** Trained positions per row. */
  readonly sequenceLength: number
  /** Tokens that a row has beyond that. */
  readonly lookahead: number
  /** Rows per micro-batch, on each rank. */
  readonly batchSize: number
  /** Micro-batches per step. */
  readonly accumulate: MicroBatches
  /** Seed of the order. */
  readonly seed: number
  /** Index of this process among those that share the data. */
  readonly rank: number
  /** Number of processes that share the data. */
  readonly world: number
  /** Rows per epoch, summed over all sources. */
  readonly windows: number
  /** Whether batches contain the start of each token's document. */
  readonly isolate: boolean
  readonly #sources: readonly OrderedSource[]
  readonly #interleaving: Interleaving
  /** If `accumulate` is a function: the number of micro-batches before each step, computed on demand. */
  readonly #before = [0]
  /** The step from which this order continues another one, and the rows before it. */
  #from = { step: 0, windows: 0 }

  /**
   * @throws MoeError E_CONFIG for sizes that are not integers of at least 1, or a rank outside the world
   * @throws MoeError E_DATA if no example has a learned token in its first `sequenceLength` positions
   */
  constructor(data: TokenStream | Mixture, options: OrderOptions) {
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
        fix: problems.length > 0 ? 'pass integers of at least 1' : 'pass a rank from 0 to world - 1',
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
    this.#sources = sourcesOf(data).map(source => this.#ordered(source))
    this.#interleaving = new Interleaving(
      this.#sources.map(({ share }) => share),
      seed,
    )
    this.windows = this.#sources.reduce((sum, { rows }) => sum + rows.count, 0)
  }

  #ordered(source: Source): OrderedSource {
    const { name, data } = source
    const rows = rowsOf(data, this.sequenceLength, this.isolate)
    if (rows.count === 0) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'TrainingOrder',
        problem: `none of ${data.documents} examples${name && ` of ${name}`} has a learned token in its first ${this.sequenceLength} positions`,
        fix: `pass a larger sequenceLength: the longest example has ${longestExample(data)} positions`,
      })
    }
    const random = new Random(this.seed)
    return { ...source, rows, order: new EpochOrder(rows.count, name === '' ? random : random.fork(name)) }
  }

  /**
   * Continues after `step` steps that took `windows` rows, for example with another batch size: later steps take the
   * rows that follow.
   */
  continueFrom(step: number, windows: number): void {
    this.#from = { step, windows }
  }

  /**
   * Returns the number of rows in the first `steps` steps, over all micro-batches and ranks. (If the order continues
   * another one, at least as many steps.)
   */
  windowsIn(steps: number): number {
    const { step, windows } = this.#from
    return windows + (this.#microBatchesIn(steps) - this.#microBatchesIn(step)) * this.batchSize * this.world
  }

  /** Returns the number of trained positions in the first `steps` steps, on this rank. */
  tokensIn(steps: number): number {
    return this.#microBatchesIn(steps) * this.batchSize * this.sequenceLength
  }

  /** Returns the (fractional) number of epochs in the first `steps` steps. */
  epochs(steps: number): number {
    return this.windowsIn(steps) / this.windows
  }

  /**
   * Returns, for each source, the rows that the first `steps` steps take from it over all micro-batches and ranks, and
   * the number of epochs.
   */
  sources(steps: number): readonly SourceProgress[] {
    const counts = this.#interleaving.counts(this.windowsIn(steps))
    return this.#sources.map(({ name, data, share, rows }, i) => {
      return { name, data, share, windows: counts[i], epochs: counts[i] / rows.count }
    })
  }

  #microBatchesIn(steps: number): number {
    if (typeof this.accumulate === 'number') return steps * this.accumulate
    const before = this.#before
    for (let step = before.length - 1; step < steps; step++)
      before.push(before[step] + microBatchesAt(this.accumulate, step))
    return before[steps]
  }

  /** Returns the micro-batches of a step (counted from 0) on this rank. */
  step(step: number): TokenBatch[] {
    const rows = this.batchSize * this.world
    const before = this.windowsIn(step)
    return Array.from({ length: microBatchesAt(this.accumulate, step) }, (_, micro) => {
      const first = before + micro * rows + this.rank * this.batchSize
      return this.#batch(first)
    })
  }

  #batch(first: number): TokenBatch {
    const rows = Array.from({ length: this.batchSize }, (_, row) => this.#rowAt(first + row))
    return batchOfSources(rows, this.sequenceLength + this.lookahead, this.isolate)
  }

  /** The row at a place of the endless sequence of rows. */
  #rowAt(place: number): SourceRow {
    const { source, index } = this.#interleaving.at(place)
    const { data, rows, order } = this.#sources[source]
    return { data, row: rows.row(order.at(index)) }
  }
}
