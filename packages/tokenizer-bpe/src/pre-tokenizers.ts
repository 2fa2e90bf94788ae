/**
 * @file The pre-tokenizers with hand-written scanners: how tokenizer.json describes them, and how they are recognized.
 */
import type { Scanner } from './scan/scanner.ts'

/** Pre-tokenizers that have a hand-written scanner. */
export type PreTokenizerName =
  | 'deepseek-v3'
  | 'deepseek-llm'
  | 'gpt2'
  | 'cl100k'
  | 'cl100k-tiktoken'
  | 'o200k'
  | 'qwen2'

export interface KnownPreTokenizer {
  readonly scanner: Scanner
  /** Regular expressions of the isolated `Split` steps; none if ByteLevel splits with its own. */
  readonly patterns: readonly string[]
  /** ByteLevel's own regular expression, for files that contain it in a `Split` step. */
  readonly explicitPattern?: string
  /** Whether each digit becomes a separate piece after the splits. */
  readonly digits?: boolean
}

/**
 * Names by the length of their signature, which distinguishes them before their patterns are loaded. Other
 * pre-tokenizers may have signatures of the same length; `isKnown` decides.
 */
const NAMES: Record<number, PreTokenizerName> = {
  11: 'gpt2',
  104: 'gpt2',
  140: 'qwen2',
  145: 'cl100k',
  151: 'cl100k-tiktoken',
  214: 'deepseek-v3',
  304: 'o200k',
  390: 'deepseek-llm',
}

export function preTokenizerNames(): PreTokenizerName[] {
  return [...new Set(Object.values(NAMES))]
}

/** Returns a JavaScript regular expression in tokenizer.json's syntax (Ruby, whose flag `m` corresponds to `s`). */
export const patternOf = ({ source, ignoreCase, dotAll }: RegExp): string =>
  `${ignoreCase ? '(?i)' : ''}${dotAll ? '(?m)' : ''}${source}`

/**
 * Returns the `pre_tokenizer` of tokenizer.json for splits by regular expressions (none: ByteLevel's own) followed by
 * ByteLevel.
 */
export function preTokenizerJson(patterns: readonly string[], digits = false): Record<string, unknown> {
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: patterns.length === 0 }
  if (patterns.length === 0) return byteLevel
  const splits: Record<string, unknown>[] = patterns.map(Regex => ({
    type: 'Split',
    pattern: { Regex },
    behavior: 'Isolated',
    invert: false,
  }))
  if (digits) splits.push({ type: 'Digits', individual_digits: true })
  return { type: 'Sequence', pretokenizers: [...splits, byteLevel] }
}

/** Returns the only known pre-tokenizer that a `pre_tokenizer` of tokenizer.json can be; `isKnown` decides. */
export function guessName(json: unknown): PreTokenizerName | undefined {
  return NAMES[signature(json)?.length ?? 0]
}

/** Whether a `pre_tokenizer` of tokenizer.json is the named one. */
export function isKnown(json: unknown, { patterns, explicitPattern, digits }: KnownPreTokenizer): boolean {
  const key = signature(json)
  return (
    key === signature(preTokenizerJson(patterns, digits)) ||
    (explicitPattern !== undefined && key === signature(preTokenizerJson([explicitPattern])))
  )
}

/**
 * Returns the steps of a `pre_tokenizer` as text: Split, Digits and ByteLevel, with the options that determine the
 * pieces. Undefined if there are other steps.
 */
function signature(json: unknown): string | undefined {
  const steps: string[] = []
  const walk = (value: unknown): boolean => {
    if (typeof value !== 'object' || value === null) return false
    const step = value as Record<string, unknown>
    if (step.type === 'Sequence') return Array.isArray(step.pretokenizers) && step.pretokenizers.every(walk)
    if (step.type === 'ByteLevel') steps.push(`B${step.add_prefix_space} ${step.use_regex ?? true}`)
    else if (step.type === 'Digits') steps.push(`D${step.individual_digits}`)
    else if (step.type === 'Split')
      steps.push(`S${step.behavior} ${step.invert} ${(step.pattern as { Regex?: unknown } | undefined)?.Regex}`)
    else return false
    return true
  }
  return walk(json) ? steps.join('\n\n') : undefined
}
