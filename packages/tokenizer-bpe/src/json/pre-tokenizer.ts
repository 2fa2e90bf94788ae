/**
 * @file Creates the pre-tokenizer of a tokenizer.json: a hand-written scanner if there is one; otherwise interpreted.
 */
import { feature, loadFeatures } from '../features.ts'
import { guessName, isKnown } from '../pre-tokenizers.ts'
import type { Scanner } from '../scan/scanner.ts'

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

/** @throws TokenizerError E_UNSUPPORTED for an unsupported step, or in browsers if its code is not loaded */
export function compilePreTokenizer(json: unknown): PreTokenizer {
  const name = guessName(json)
  if (name !== undefined) {
    const known = feature(name)
    if (isKnown(json, known)) return { name, scanner: known.scanner }
  }
  return feature('steps')(json)
}

/** Loads the features that `compilePreTokenizer` needs for this `pre_tokenizer`. */
export async function loadPreTokenizer(json: unknown): Promise<void> {
  const name = guessName(json)
  if (name !== undefined) await loadFeatures(name)
  if (name === undefined || !isKnown(json, feature(name))) await loadFeatures('steps')
}
