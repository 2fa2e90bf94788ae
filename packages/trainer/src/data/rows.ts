/** @file Which tokens the rows of a data set hold, and how they come into a batch. */
import type { TokenBatch } from '../model.ts'
import { endFrom, learnedFrom } from './examples.ts'
import type { TokenStream } from './token-stream.ts'

/** A row: where what it holds begins in the stream. What begins first stands first; each goes on to its end, or to that of the row. */
export type Row = readonly number[]

/** Millions of windows take no memory. */
export interface Rows {
  readonly count: number
  row(index: number): Row
}

const listed = (rows: readonly Row[]): Rows => ({ count: rows.length, row: index => rows[index] })

/** Windows of a stream, `stride` apart. */
export const windows = (count: number, stride: number): Rows => ({ count, row: index => [index * stride] })

/**
 * Rows of `length` positions: windows of the stream, so that every token is predicted in one of them; or the examples that have something to learn in so many
 * positions, each in a row of its own or, with `isolate`, as many in a row as have room.
 */
export function rowsOf(data: TokenStream, length: number, isolate: boolean): Rows {
  if (data.examples === null) return windows(Math.ceil((data.length - 1) / length), length)
  const learned = Array.from(data.examples).filter(start => learnedFrom(data, start, length) > 0)
  return listed(isolate ? shared(data, learned, length + 1) : learned.map(start => [start]))
}

/** Examples in rows of `room` tokens: the longest first, each where it leaves the least room (best fit decreasing). */
function shared(data: TokenStream, starts: readonly number[], room: number): readonly Row[] {
  const sizeOf = (start: number) => Math.min(room, endFrom(data, start) - start)
  const rows: number[][] = []
  /** Rows by the room that they have left. */
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
 * Rows as a batch, `length` tokens each, filled up with padding.
 * @param isolate says of each token where its document, or example, begins
 */
export function batchOf(data: TokenStream, rows: readonly Row[], length: number, isolate: boolean): TokenBatch {
  return batchOfSources(
    rows.map(row => ({ data, row })),
    length,
    isolate,
  )
}

/** The same of several sources. */
export function batchOfSources(rows: readonly SourceRow[], length: number, isolate: boolean): TokenBatch {
  const batch = paddingBatch(rows.length, length, isolate)
  rows.forEach(({ data, row }, r) => {
    batch.tokens.fill(data.padding, r * length, (r + 1) * length)
    let at = 0
    for (const start of row) at += copy(data, start, batch, r * length, at)
  })
  return batch
}

/** A batch of rows in which no position counts. */
export function paddingBatch(rows: number, length: number, isolate: boolean): TokenBatch {
  const size = rows * length
  const documents = new Int32Array(size)
  const starts = isolate ? new Int32Array(size) : undefined
  for (let i = 0; i < size; i++) {
    const at = i % length
    // Never equal to a neighbour's.
    documents[i] = -at - 1
    if (starts) starts[i] = at
  }
  return { tokens: new Int32Array(size), documents, ...(starts && { starts }), rows, length }
}

/** Copies what begins at `start` of the stream to place `at` of the row that begins at `row`. @returns how many tokens that were */
function copy(data: TokenStream, start: number, batch: TokenBatch, row: number, at: number): number {
  const count = Math.max(0, Math.min(batch.length - at, endFrom(data, start) - start))
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
