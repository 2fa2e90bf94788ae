/** @file `pre_tokenizer` of tokenizer.json: a hand-written scanner where there is one, its steps one by one where not. */
import { fetchParts, part } from '../parts.ts'
import { guessName, isKnown } from '../pre-tokenizers.ts'
import type { Scanner } from '../scan/scanner.ts'

/** Bytes with PADDING after them, and how many there are. */
export interface PreparedText {
  readonly bytes: Uint8Array
  readonly length: number
  /** Index of each byte in the text as it was. */
  readonly origin: Int32Array
}

export interface PreTokenizer {
  /** Name of the scanner, or `steps`. */
  readonly name: string
  readonly scanner: Scanner
  /**
   * Cuts a text ahead of the scanner, which then gives the pieces of what was prepared last.
   * @param first whether the text begins where the whole input does
   */
  readonly prepare?: (bytes: Uint8Array, start: number, end: number, first: boolean) => PreparedText
}

export function compilePreTokenizer(json: unknown): PreTokenizer {
  const name = guessName(json)
  if (name !== undefined) {
    const known = part(name)
    if (isKnown(json, known)) return { name, scanner: known.scanner }
  }
  return part('steps')(json)
}

/** Fetches what `compilePreTokenizer` needs for this `pre_tokenizer`. */
export async function fetchPreTokenizer(json: unknown): Promise<void> {
  const name = guessName(json)
  if (name !== undefined) await fetchParts(name)
  if (name === undefined || !isKnown(json, part(name))) await fetchParts('steps')
}
