/** @file Strided evaluation: overlapping windows in which every token is predicted once, with context. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import type { TokenBatch } from '../model.ts'
import { batchOf, type Row, rowsOf, windows } from './rows.ts'
import type { TokenStream } from './token-stream.ts'

/** Options of `evaluationWindows`. */
export interface EvaluationOptions {
  /** Positions per window. */
  readonly sequenceLength: number
  /** Tokens that a row has beyond that: `TrainableModel.lookahead`. */
  readonly lookahead: number
  /** Rows per batch. */
  readonly batchSize: number
  /** As in `OrderOptions`. Default false. */
  readonly isolate?: boolean | undefined
  /** Approximate number of tokens to evaluate on, spread evenly over the data. Default: all. */
  readonly limit?: number | undefined
}

const names: OptionNames<EvaluationOptions> = {
  sequenceLength: true,
  lookahead: true,
  batchSize: true,
  isolate: true,
  limit: true,
}

/** A batch of windows, as rows. */
export interface EvaluationBatch {
  /** Rows of `sequenceLength + lookahead` tokens. */
  readonly batch: TokenBatch
  /** Positions before this one are context only. */
  readonly from: number
  /** Fraction of all windows up to and including this batch. */
  readonly done: number
}

/**
 * Yields windows that overlap by half. The first window counts all its positions, and each later one its second half,
 * so that every token but the first is predicted exactly once, with at least half a window of context (except in the
 * first window). Examples do not overlap: each is a window of its own or shares one.
 */
export function evaluationWindows(data: TokenStream, options: EvaluationOptions): Generator<EvaluationBatch> {
  return evaluationWindowsWhere(data, options, () => true)
}

/** Yields only the batches whose index `isWanted` accepts, and reads the tokens of no others. */
export function* evaluationWindowsWhere(
  data: TokenStream,
  options: EvaluationOptions,
  isWanted: (index: number) => boolean,
): Generator<EvaluationBatch> {
  checkOptions('evaluationWindows', options, names)
  const { sequenceLength, lookahead, batchSize, isolate = false, limit } = options
  const wrong = Object.entries({ sequenceLength, lookahead, batchSize }).filter(
    ([, size]) => !Number.isSafeInteger(size) || size < 1,
  )
  if (wrong.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'evaluate',
      problem: wrong.map(([name, size]) => `${name} is ${size}`).join(', '),
      fix: 'pass integers of at least 1',
    })
  }
  const length = sequenceLength + lookahead
  const stride = Math.max(1, sequenceLength >> 1)
  const overlaps = data.examples === null
  const rows = overlaps
    ? windows(1 + Math.ceil(Math.max(0, data.length - 1 - sequenceLength) / stride), stride)
    : rowsOf(data, sequenceLength, isolate)
  const all = rows.count
  const each = overlaps ? stride : data.length / Math.max(1, all)
  const count = limit === undefined ? all : Math.min(all, Math.max(1, Math.floor(limit / each)))
  const from = overlaps ? sequenceLength - stride : 0
  let waiting: Row[] = []
  let index = 0
  for (let i = 0; i < count; i++) {
    waiting.push(rows.row(Math.floor((i * all) / count)))
    // The first window has no context, so all of its positions count. It is a batch of its own.
    const first = overlaps && i === 0
    if (!first && waiting.length < batchSize && i < count - 1) continue
    if (isWanted(index++))
      yield { batch: batchOf(data, waiting, length, isolate), from: first ? 0 : from, done: (i + 1) / count }
    waiting = []
  }
}
