/** @file Where the examples of a stream end, and how much of them fits into a row. */
import { lastUpTo, type TokenStream } from './token-stream.ts'

/** End of the example that contains `start`, or of the stream if it has documents. */
export function endFrom({ examples, length }: TokenStream, start: number): number {
  return examples?.[lastUpTo(examples, start) + 1] ?? length
}

/** Number of tokens predicted in the first `length` positions of the example at `start`. */
export function learnedFrom(data: TokenStream, start: number, length: number): number {
  const last = Math.min(endFrom(data, start) - 1, start + length)
  return last - start - (data.documentAt(last) - data.documentAt(start))
}

/** Number of learned tokens that rows of `length` positions cut off from longer examples. */
export function truncatedTokens(data: TokenStream, length: number): number {
  if (data.examples === null) return 0
  return data.examples.reduce((sum, start) => sum - learnedFrom(data, start, length), data.predictable)
}

/** Positions of the longest example; 0 for a stream of documents. */
export function longestExample(data: TokenStream): number {
  return data.examples?.reduce((most, start) => Math.max(most, endFrom(data, start) - start - 1), 0) ?? 0
}
