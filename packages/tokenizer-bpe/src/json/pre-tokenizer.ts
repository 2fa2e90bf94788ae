/** @file `pre_tokenizer` of tokenizer.json: a hand-written scanner where there is one, its steps one by one where not. */
import { KNOWN, recognize } from '../pre-tokenizers.ts'
import type { Scanner } from '../scan/scanner.ts'
import { readSteps, runSteps } from '../split-steps.ts'

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
  const name = recognize(json)
  if (name !== undefined) return { name, scanner: KNOWN[name].scanner }
  const steps = readSteps(json)
  let prepared = new Int32Array(0)
  let next = 0
  return {
    name: 'steps',
    prepare: (bytes, start, end, first) => {
      const text = runSteps(steps, bytes, start, end, first)
      prepared = text.ends
      next = 0
      return text
    },
    scanner: (_bytes, _pos, _end, ends) => {
      const count = Math.min(ends.length, prepared.length - next)
      for (let i = 0; i < count; i++) ends[i] = prepared[next + i]
      next += count
      return count
    },
  }
}
