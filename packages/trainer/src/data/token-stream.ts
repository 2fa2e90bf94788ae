/** @file The interface of a token stream, in memory or on disk. */

/**
 * A stream of tokens, divided into documents or examples: in memory (`TokenDataset`) or on disk (`tokenFiles`).
 * Positions are integers up to 2^53.
 */
export interface TokenStream {
  /** Number of tokens in the stream. */
  readonly length: number
  /** Number of documents, or of examples. */
  readonly documents: number
  /** Position of the first token of each example, ascending; null for documents. */
  readonly examples: Int32Array | null
  /** Number of predicted tokens: all but the first of each document, or the learned tokens of examples. */
  readonly predictable: number
  /** Number of text tokens that nothing precedes in their document (only without a begin token). */
  readonly unpredictable: number
  /** UTF-8 bytes of the predicted text; 0 if unknown. */
  readonly textBytes: number
  /** Number of ids; all are below this. */
  readonly vocabSize: number
  /** Id that fills up rows after the end of the stream. */
  readonly padding: number
  /** Id of the token that ends every text; null if there is none, undefined if unknown. @internal */
  readonly end: number | null | undefined
  /** Digest of the tokenizer, if it was recorded. @internal */
  readonly tokenizer?: string | undefined
  /** Digest of the content, for checkpoints. */
  readonly digest: string
  /** Returns `count` tokens from position `from` on, all of which must exist. The caller must not change them. */
  read(from: number, count: number): Int32Array
  /**
   * Returns the document number of a token, from 0. In examples, every unlearned token starts a new number, so that a
   * token is predicted exactly if it has the same number as the one before it.
   */
  documentAt(position: number): number
  /** Returns the position of the first token of a document number; Infinity after the last. */
  startOf(document: number): number
}

/** Distinguishes a stream from texts, and from a record of streams. */
export const isTokenStream = (value: unknown): value is TokenStream =>
  typeof value === 'object' && value !== null && typeof (value as Partial<TokenStream>).read === 'function'

/** Index of the last element that is at most `position`, in ascending numbers that start with 0. */
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
