/** @file Fill-in-the-middle in the order prefix, suffix, middle (PSM), as DeepSeek-V3 pre-trains with it (report, section 4.1). */
import { checkCall } from '../check-call.ts'
import { TokenizerError } from '../errors.ts'

/** How often, by which numbers and with which sentinels documents are rearranged. */
export interface FillInTheMiddleOptions {
  /** Fraction of documents that are rearranged. Default 0.1, DeepSeek-V3's. */
  readonly rate?: number
  /** Numbers in [0, 1); `randomNumbers(seed)` makes a reproducible source. */
  readonly random: () => number
  /** Sentinels. Default: those of DeepSeek-V3's tokenizer. */
  readonly tokens?: { readonly begin: string; readonly hole: string; readonly end: string }
}

/** Sentinels as DeepSeek-V3's tokenizer.json spells them. */
export const DEEPSEEK_FIM_TOKENS = { begin: '<｜fim▁begin｜>', hole: '<｜fim▁hole｜>', end: '<｜fim▁end｜>' }

/**
 * Rearranges a document, with probability `rate`, as `begin prefix hole suffix end middle`; else returns it as it is. Cuts at two random places, never
 * inside a surrogate pair. Apply it to whole documents, before they are packed; the end-of-text token goes after the result.
 * @throws TokenizerError E_CONFIG for a rate outside 0..1, E_DATA for a document that already holds a sentinel
 */
export function fillInTheMiddle(document: string, options: FillInTheMiddleOptions): string {
  checkCall('fillInTheMiddle', options)
  const { rate = 0.1, random, tokens = DEEPSEEK_FIM_TOKENS } = options
  if (!(rate >= 0 && rate <= 1)) {
    throw new TokenizerError({ code: 'E_CONFIG', op: 'fillInTheMiddle', problem: `rate ${rate} is not from 0 to 1` })
  }
  if (random() >= rate || document.length < 3) return document
  for (const token of Object.values(tokens)) {
    if (document.includes(token)) {
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'fillInTheMiddle',
        problem: `the document already holds ${token}`,
        fix: 'remove the sentinels from the text first',
      })
    }
  }
  const a = place(document, random)
  const b = place(document, random)
  const [from, to] = a <= b ? [a, b] : [b, a]
  return `${tokens.begin}${document.slice(0, from)}${tokens.hole}${document.slice(to)}${tokens.end}${document.slice(from, to)}`
}

function place(document: string, random: () => number): number {
  const at = Math.floor(random() * (document.length + 1))
  const low = document.charCodeAt(at)
  return low >= 0xdc00 && low < 0xe000 && at > 0 ? at - 1 : at
}
