/** @file `pre_tokenizer` of tokenizer.json: a hand-written scanner where there is one. */
import { KNOWN, recognize } from '../pre-tokenizers.ts'
import type { Scanner } from '../scan/scanner.ts'
import { unsupported } from './check.ts'

/** Bytes with PADDING after them, and how many there are. */
export interface PreparedText {
  readonly bytes: Uint8Array
  readonly length: number
}

export interface PreTokenizer {
  readonly name: string
  readonly scanner: Scanner
  /** Rewrites a text before the scanner goes over it, where pieces are dropped or changed. */
  readonly prepare?: (bytes: Uint8Array, start: number, end: number) => PreparedText
}

export function compilePreTokenizer(json: unknown): PreTokenizer {
  const name = recognize(json)
  if (name === undefined) throw unsupported('pre_tokenizer', 'this pre-tokenizer')
  return { name, scanner: KNOWN[name].scanner }
}
