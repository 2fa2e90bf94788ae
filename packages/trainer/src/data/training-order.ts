/**
 * @file Which rows a training step sees: a function of the step number alone, so that nothing but that number need be
 * saved.
 */
import { checkOptions, MoeError, type OptionNames, Random, shown } from '@moe/core'
import type { TokenBatch } from '../model.ts'
import { EpochOrder } from './epoch-order.ts'
import { longestExample } from './examples.ts'
import { Interleaving } from './interleaving.ts'
import { type Mixture, type Source, sourcesOf } from './mixture.ts'
import { batchOfSources, type Rows, rowsOf, type SourceRow } from './rows.ts'
import type { TokenStream } from './token-stream.ts'

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

/** What steps take from a source. */
export interface SourceProgress extends Source {
  /** Windows, over all micro-batches and ranks. */
  readonly windows: number
  /** How often these go through the source. */
  readonly epochs: number
}

/** A source with the order of its windows. */
interface OrderedSource extends Source {
  readonly rows: Rows
  readonly order: EpochOrder
}

/**
 * Windows of `sequenceLength` positions, each once an epoch, in an order drawn anew for every epoch. Window w starts
 * at token `w * sequenceLength`, so that every token of the stream but the first is predicted once an epoch; of examples, each is a window, or
 * shares one. What a window has no tokens for is filled up with padding. Of a `mixture`, each source has an order and epochs of its own.
 */
export class TrainingOrder {
  /** What windows are cut from. */
  readonly data: TokenStream | Mixture
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
  /** Windows of an epoch; of all sources, where there are several. */
  readonly windows: number
  /** Whether batches say where each document begins. */
  readonly isolate: boolean
  readonly #sources: readonly OrderedSource[]
  readonly #interleaving: Interleaving
  /** Where `accumulate` is a function: micro-batches before each step, as far as they were asked for. */
  readonly #before = [0]

  /** @throws MoeError E_CONFIG for sizes that are not whole numbers from 1, or a rank outside the world; E_DATA where no example has something to learn in so many positions */
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
        problem: `none of ${data.documents} examples${name && ` of ${name}`} has something to learn in its first ${this.sequenceLength} positions`,
        fix: `a sequenceLength of ${longestExample(data)} holds the longest`,
      })
    }
    const random = new Random(this.seed)
    return { ...source, rows, order: new EpochOrder(rows.count, name === '' ? random : random.fork(name)) }
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

  /** Of each source: the windows that the first `steps` steps take from it, over all micro-batches and ranks, and how many epochs these are. */
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
