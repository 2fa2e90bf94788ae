/** @file Where examples end in a stream, and how much of them rows hold. */
import { lastUpTo, type TokenStream } from './token-stream.ts'

/** End of what may stand behind `start` in a row: of the example there, or of the stream. */
export function endFrom({ examples, length }: TokenStream, start: number): number {
  return examples?.[lastUpTo(examples, start) + 1] ?? length
}

/** Tokens that are predicted in the first `length` positions of the example at `start`. */
export function learnedFrom(data: TokenStream, start: number, length: number): number {
  const last = Math.min(endFrom(data, start) - 1, start + length)
  return last - start - (data.documentAt(last) - data.documentAt(start))
}

/** How many of the tokens that are to be predicted rows of `length` positions leave out: those of examples that go on behind them. */
export function truncatedTokens(data: TokenStream, length: number): number {
  if (data.examples === null) return 0
  return data.examples.reduce((sum, start) => sum - learnedFrom(data, start, length), data.predictable)
}

/** Positions of the longest example; 0 for documents. */
export function longestExample(data: TokenStream): number {
  return data.examples?.reduce((most, start) => Math.max(most, endFrom(data, start) - start - 1), 0) ?? 0
}
