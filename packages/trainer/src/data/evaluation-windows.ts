/** @file Strided evaluation: overlapping windows in which every token is predicted once, with context before it. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import type { TokenBatch } from '../model.ts'
import { batchOf, type Row, rowsOf, windows } from './rows.ts'
import type { TokenStream } from './token-stream.ts'

/** Windows, and how much of the data they cover. */
export interface EvaluationOptions {
  /** Positions of a window. */
  readonly sequenceLength: number
  /** Tokens that a row has beyond that; `TrainableModel.lookahead`. */
  readonly lookahead: number
  /** Rows of a batch. */
  readonly batchSize: number
  /** As in `OrderOptions`. Default false. */
  readonly isolate?: boolean
  /** Measure on about so many tokens, spread evenly over the data. Default: on all. */
  readonly limit?: number
}

const names: OptionNames<EvaluationOptions> = {
  sequenceLength: true,
  lookahead: true,
  batchSize: true,
  isolate: true,
  limit: true,
}

/** Some windows of the data, as rows. */
export interface EvaluationBatch {
  /** Rows of `sequenceLength + lookahead` tokens. */
  readonly batch: TokenBatch
  /** Positions before this one are context. */
  readonly from: number
  /** Share of all windows that are done with this batch. */
  readonly done: number
}

/**
 * Windows that overlap by half: the first counts all its positions, each later one its second half, so that every
 * token of the stream but the first is predicted exactly once, and all but those of the first window with at least
 * half a window of context. Of examples, each is a window, or shares one.
 */
export function* evaluationWindows(data: TokenStream, options: EvaluationOptions): Generator<EvaluationBatch> {
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
      fix: 'sizes are whole numbers from 1',
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
  for (let i = 0; i < count; i++) {
    waiting.push(rows.row(Math.floor((i * all) / count)))
    // The first window has nothing before it, so all of it counts.
    const first = overlaps && i === 0
    if (!first && waiting.length < batchSize && i < count - 1) continue
    yield { batch: batchOf(data, waiting, length, isolate), from: first ? 0 : from, done: (i + 1) / count }
    waiting = []
  }
}
