/**
 * @file Fill-in-the-middle in the order prefix, suffix, middle (PSM), as in the pre-training of DeepSeek-V3 (report,
 * section 4.1).
 */

import { TokenizerError } from '../errors.ts'
import { type CallRules, isTexts, type OptionRule, randomRule, validateCall } from '../validate-call.ts'

/** Options of `fillInTheMiddle`. */
export interface FillInTheMiddleOptions {
  /** Fraction of documents to rearrange. Default 0.1, as in DeepSeek-V3. */
  readonly rate?: number | undefined
  /** Returns numbers in [0, 1); use `randomNumbers(seed)` for a reproducible source. */
  readonly random: () => number
  /** Sentinel tokens. Default: those of DeepSeek-V3's tokenizer. */
  readonly tokens?: FimTokens | undefined
}

/** The texts of the sentinel tokens. */
export interface FimTokens {
  /** Before the prefix. */
  readonly begin: string
  /** Between prefix and suffix. */
  readonly hole: string
  /** After the suffix; the middle follows. */
  readonly end: string
}

const tokensRule: OptionRule = [
  'three texts: { begin, hole, end }',
  value => isTexts(['begin', 'hole', 'end'].map(name => Object(value)[name])),
]

const rules: CallRules<FillInTheMiddleOptions> = { options: { rate: true, random: randomRule, tokens: tokensRule } }

const promptRules: CallRules<Pick<FillInTheMiddleOptions, 'tokens'>> = {
  options: { tokens: tokensRule },
  input: ['two texts', isTexts, 'pass the text before the gap, and the text after it'],
}

/** The sentinel tokens of DeepSeek-V3's tokenizer.json. */
export const DEEPSEEK_FIM_TOKENS: FimTokens = { begin: '<｜fim▁begin｜>', hole: '<｜fim▁hole｜>', end: '<｜fim▁end｜>' }

/**
 * Rearranges a document, with probability `rate`, as `begin prefix hole suffix end middle`; otherwise returns it
 * unchanged. The document is split at two random positions, never within a surrogate pair. Apply it to whole documents
 * before packing; the end-of-text token follows the result.
 * @throws TokenizerError E_CONFIG for a rate outside 0..1, E_DATA for a document that contains a sentinel
 */
export function fillInTheMiddle(document: string, options: FillInTheMiddleOptions): string {
  validateCall('fillInTheMiddle', rules, options)
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
        problem: `the document contains the sentinel ${token}`,
        fix: 'remove the sentinels from the text first',
      })
    }
  }
  const a = randomPosition(document, random)
  const b = randomPosition(document, random)
  const [from, to] = a <= b ? [a, b] : [b, a]
  return fillInTheMiddlePrompt(document.slice(0, from), document.slice(to), { tokens }) + document.slice(from, to)
}

/**
 * Returns the prompt after which a model that was trained on results of `fillInTheMiddle` writes what is missing between
 * `prefix` and `suffix`.
 * @param options.tokens sentinel tokens. Default: those of DeepSeek-V3's tokenizer
 * @throws TokenizerError E_DATA if one of them is not a text
 */
export function fillInTheMiddlePrompt(
  prefix: string,
  suffix: string,
  options: Pick<FillInTheMiddleOptions, 'tokens'> = {},
): string {
  validateCall('fillInTheMiddlePrompt', promptRules, options, [prefix, suffix])
  const { begin, hole, end } = options.tokens ?? DEEPSEEK_FIM_TOKENS
  return `${begin}${prefix}${hole}${suffix}${end}`
}

/** Returns a random position that is not within a surrogate pair. */
function randomPosition(document: string, random: () => number): number {
  const at = Math.floor(random() * (document.length + 1))
  const low = document.charCodeAt(at)
  return low >= 0xdc00 && low < 0xe000 && at > 0 ? at - 1 : at
}
