/** @file Strided evaluation: overlapping windows in which every token is predicted once, with context before it. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import type { TokenBatch } from '../model.ts'
import type { TokenDataset } from './token-dataset.ts'

export interface EvaluationOptions {
  /** Positions of a window. */
  readonly sequenceLength: number
  readonly lookahead: number
  /** Rows of a batch. */
  readonly batchSize: number
  /** Measure on about so many tokens, spread evenly over the data. Default: on all. */
  readonly limit?: number
}

const names: OptionNames<EvaluationOptions> = { sequenceLength: true, lookahead: true, batchSize: true, limit: true }

export interface EvaluationBatch {
  readonly batch: TokenBatch
  /** Positions before this one are context. */
  readonly from: number
  /** Share of all windows that are done with this batch. */
  readonly done: number
}

/**
 * Windows that overlap by half: the first counts all its positions, each later one its second half, so that every
 * token of the stream but the first is predicted exactly once, and all but those of the first window with at least
 * half a window of context. Of examples, each is a window.
 */
export function* evaluationWindows(data: TokenDataset, options: EvaluationOptions): Generator<EvaluationBatch> {
  checkOptions('evaluationWindows', options, names)
  const { sequenceLength, lookahead, batchSize, limit } = options
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
  const batchOf = (starts: readonly number[]): TokenBatch => {
    const tokens = new Int32Array(starts.length * length)
    const documents = new Int32Array(starts.length * length)
    starts.forEach((start, row) => {
      data.copyRow(start, length, tokens, documents, row * length)
    })
    return { tokens, documents, rows: starts.length, length }
  }
  const stride = Math.max(1, sequenceLength >> 1)
  const streams = data.examples === null
  const starts = streams
    ? Int32Array.from(
        { length: 1 + Math.ceil(Math.max(0, data.tokens.length - 1 - sequenceLength) / stride) },
        (_, i) => i * stride,
      )
    : data.rowStarts(sequenceLength)
  const all = starts.length
  const each = streams ? stride : data.tokens.length / Math.max(1, all)
  const count = limit === undefined ? all : Math.min(all, Math.max(1, Math.floor(limit / each)))
  if (streams) yield { batch: batchOf([0]), from: 0, done: 1 / count }
  const from = streams ? sequenceLength - stride : 0
  let waiting: number[] = []
  for (let i = streams ? 1 : 0; i < count; i++) {
    waiting.push(starts[Math.floor((i * all) / count)])
    if (waiting.length === batchSize || i === count - 1) {
      yield { batch: batchOf(waiting), from, done: (i + 1) / count }
      waiting = []
    }
  }
}
