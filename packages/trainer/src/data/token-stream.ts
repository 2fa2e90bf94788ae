/** @file What training and measurement read: a stream of tokens with documents, wherever it is. */

/** A stream of tokens with documents: in memory (`TokenDataset`) or on disk (`tokenFiles`). Positions are whole numbers up to 2^53. */
export interface TokenStream {
  /** Tokens of the whole stream. */
  readonly length: number
  /** Number of documents, or of examples. */
  readonly documents: number
  /** Position of the first token of each example, ascending; null for documents. */
  readonly examples: Int32Array | null
  /** Tokens that are predicted: all but the first of each document; of examples those that are learned. */
  readonly predictable: number
  /** Text tokens that nothing precedes in their document (only where it has no begin token). */
  readonly unpredictable: number
  /** UTF-8 bytes of the texts, as far as they are predicted; 0 where nobody knows. */
  readonly textBytes: number
  /** Every id is below this. */
  readonly vocabSize: number
  /** What rows are filled up with after the end of the stream. */
  readonly padding: number
  /** What every text ends with: a token, null where texts just end, undefined where nobody knows. @internal */
  readonly end: number | null | undefined
  /** Identity of the tokenizer that made it, where somebody wrote that down. @internal */
  readonly tokenizer?: string | undefined
  /** Identity of the content, for checkpoints. */
  readonly digest: string
  /** Tokens from a position on, which the caller does not change. The stream has so many there. */
  read(from: number, count: number): Int32Array
  /**
   * What the token at `position` is numbered with in batches: the tokens that are predicted, and the one before them, have the same number. Of documents it
   * is theirs, from 0.
   */
  documentAt(position: number): number
  /** Position of the first token of that number; Infinity behind the last. */
  startOf(document: number): number
}

/** Tells a stream from texts, and from several streams by name. */
export const isTokenStream = (value: unknown): value is TokenStream =>
  typeof value === 'object' && value !== null && typeof (value as Partial<TokenStream>).read === 'function'

/** Index of the last of some ascending numbers, the first of which is 0, that is not above `position`. */
export function lastUpTo(
  ascending: { readonly length: number; readonly [i: number]: number },
  position: number,
): number {
  let low = 0
  let high = ascending.length - 1
  while (low < high) {
    const middle = (low + high + 1) >>> 1
    if (ascending[middle] <= position) low = middle
    else high = middle - 1
  }
  return low
}
