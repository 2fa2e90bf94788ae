/** @file A pre-tokenizer: how a text is rewritten and split into pieces before merging. */
import type { Scanner } from './scan/scanner.ts'

/** A text as rewritten by a pre-tokenizer. */
export interface PreparedText {
  /** UTF-8 with PADDING bytes after it. */
  readonly bytes: Uint8Array
  /** Number of bytes without PADDING. */
  readonly length: number
  /** Index of each byte in the original text. */
  readonly origin: Int32Array
}

export interface PreTokenizer {
  /** Name of the scanner, or `steps`. */
  readonly name: string
  readonly scanner: Scanner
  /**
   * Rewrites and splits a text before the scanner is called, which then returns the pieces of the last prepared text.
   * @param first whether the text is the start of the input
   */
  readonly prepare?: (bytes: Uint8Array, start: number, end: number, first: boolean) => PreparedText
}
