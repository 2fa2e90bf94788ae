/** @file Divides a data set into rows, and copies rows into batches. */
import type { TokenBatch } from '../model.ts'
import { endFrom, learnedFrom } from './examples.ts'
import type { TokenStream } from './token-stream.ts'

/**
 * A row, as the start positions of its documents or examples in the stream, in order. Each continues to its end, or to
 * the end of the row.
 */
export type Row = readonly number[]

/** A list of rows that may be computed on demand, because a corpus has millions of windows. */
export interface Rows {
  readonly count: number
  row(index: number): Row
}

const listed = (rows: readonly Row[]): Rows => ({ count: rows.length, row: index => rows[index] })

/** Windows of a stream that start `stride` tokens apart. */
export const windows = (count: number, stride: number): Rows => ({ count, row: index => [index * stride] })

/**
 * Rows of `length` positions. A stream of documents is divided into windows, so that every token is predicted once.
 * Examples with learned tokens in the first `length` positions get a row each; with `isolate`, they are packed.
 */
export function rowsOf(data: TokenStream, length: number, isolate: boolean): Rows {
  if (data.examples === null) return windows(Math.ceil((data.length - 1) / length), length)
  const learned = Array.from(data.examples).filter(start => learnedFrom(data, start, length) > 0)
  return listed(isolate ? packed(data, learned, length + 1) : learned.map(start => [start]))
}

/**
 * Packs examples into rows of `room` tokens: longest first, each into the row where it leaves the least space (best-fit
 * decreasing).
 */
function packed(data: TokenStream, starts: readonly number[], room: number): readonly Row[] {
  const sizeOf = (start: number) => Math.min(room, endFrom(data, start) - start)
  const rows: number[][] = []
  /** Rows by their remaining space. */
  const open: number[][][] = Array.from({ length: room + 1 }, () => [])
  let most = 0
  for (const start of [...starts].sort((a, b) => sizeOf(b) - sizeOf(a))) {
    const size = sizeOf(start)
    while (most > 0 && open[most].length === 0) most--
    let left = size
    while (left <= most && open[left].length === 0) left++
    let row = left <= most ? open[left].pop() : undefined
    if (row === undefined) {
      row = []
      rows.push(row)
      left = room
    }
    row.push(start)
    open[left - size].push(row)
    most = Math.max(most, left - size)
  }
  return rows
}

/** A row of one of several sources. */
export interface SourceRow {
  readonly data: TokenStream
  readonly row: Row
}

/**
 * Copies rows into a batch of `length` tokens each, filled up with padding.
 *
 * @param isolate whether to record the start of each token's document or example
 */
export function batchOf(data: TokenStream, rows: readonly Row[], length: number, isolate: boolean): TokenBatch {
  return batchOfSources(
    rows.map(row => ({ data, row })),
    length,
    isolate,
  )
}

/** `batchOf` for rows of several sources. */
export function batchOfSources(rows: readonly SourceRow[], length: number, isolate: boolean): TokenBatch {
  const batch = paddingBatch(rows.length, length, isolate)
  rows.forEach(({ data, row }, r) => {
    batch.tokens.fill(data.padding, r * length, (r + 1) * length)
    let at = 0
    for (const start of row) at += copy(data, start, batch, r * length, at)
  })
  return batch
}

/** A batch of padding, in which no position counts. */
export function paddingBatch(rows: number, length: number, isolate: boolean): TokenBatch {
  const size = rows * length
  const documents = new Int32Array(size)
  const starts = isolate ? new Int32Array(size) : undefined
  for (let i = 0; i < size; i++) {
    const at = i % length
    // Different from its neighbors, so that no position counts.
    documents[i] = -at - 1
    if (starts) starts[i] = at
  }
  return { tokens: new Int32Array(size), documents, ...(starts && { starts }), rows, length }
}

/**
 * Copies the document or example at `start` to position `at` of a row that begins at `row`. @returns the number of
 * tokens
 */
function copy(data: TokenStream, start: number, batch: TokenBatch, row: number, at: number): number {
  const count = Math.min(batch.length - at, endFrom(data, start) - start)
  batch.tokens.set(data.read(start, count), row + at)
  let document = data.documentAt(start)
  let from = data.startOf(document)
  let next = data.startOf(document + 1)
  for (let i = 0; i < count; i++) {
    while (next <= start + i) {
      document++
      from = next
      next = data.startOf(document + 1)
    }
    batch.documents[row + at + i] = document
    if (batch.starts) batch.starts[row + at + i] = data.examples === null ? Math.max(0, from - start) : at
  }
  return count
}
