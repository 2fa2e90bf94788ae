/** @file `pre_tokenizer` of tokenizer.json: a hand-written scanner where there is one, its steps one by one where not. */
import { KNOWN, recognize } from '../pre-tokenizers.ts'
import type { Scanner } from '../scan/scanner.ts'
import { unsupported } from './check.ts'

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

type Compile = (json: unknown) => PreTokenizer

/** Compiles what no scanner covers. Nearly a third of the code, so the build for browsers fetches it only for a file that needs it. */
let compileSteps: Compile | undefined

export function provideSteps(compile: Compile): void {
  compileSteps = compile
}

/** Fetches what `compilePreTokenizer` needs for this `pre_tokenizer`. */
export async function fetchSteps(json: unknown): Promise<void> {
  if (compileSteps === undefined && recognize(json) === undefined) {
    provideSteps((await import('./pre-tokenizer-steps.ts')).compileSteps)
  }
}

export function compilePreTokenizer(json: unknown, compile: Compile | undefined = compileSteps): PreTokenizer {
  const name = recognize(json)
  if (name !== undefined) return { name, scanner: KNOWN[name].scanner }
  if (compile === undefined) {
    throw unsupported(
      'pre_tokenizer',
      'in a browser, one without a hand-written scanner before its code is fetched',
      'use `await BpeTokenizer.fromJSONAsync(json)`',
    )
  }
  return compile(json)
}
