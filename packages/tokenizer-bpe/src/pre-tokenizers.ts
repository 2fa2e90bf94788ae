/** @file The pre-tokenizers with a scanner: how tokenizer.json spells them, and how they are told from others. */
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
  /** Regular expressions of the `Split` steps, each isolated; none for a ByteLevel that brings its own. */
  readonly patterns: readonly string[]
  /** What ByteLevel brings, for files that spell it out. */
  readonly spelled?: string
  /** Whether each digit becomes a piece of its own after the splits. */
  readonly digits?: boolean
}

/**
 * Names by the length of their signature, which tells them apart before their patterns are there. That of another pre-tokenizer may be as long: `isKnown`
 * has the last word.
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

/** A regular expression of JavaScript as tokenizer.json writes it (Ruby syntax, where the flag `m` is what `s` is here). */
export const patternOf = ({ source, ignoreCase, dotAll }: RegExp): string =>
  `${ignoreCase ? '(?i)' : ''}${dotAll ? '(?m)' : ''}${source}`

/** The `pre_tokenizer` of tokenizer.json for splits by regular expression (none: ByteLevel's own) before ByteLevel. */
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

/** The only name that a `pre_tokenizer` of tokenizer.json may have. */
export function guessName(json: unknown): PreTokenizerName | undefined {
  return NAMES[signature(json)?.length ?? 0]
}

/** Whether a `pre_tokenizer` of tokenizer.json is this one. */
export function isKnown(json: unknown, { patterns, spelled, digits }: KnownPreTokenizer): boolean {
  const key = signature(json)
  return (
    key === signature(preTokenizerJson(patterns, digits)) ||
    (spelled !== undefined && key === signature(preTokenizerJson([spelled])))
  )
}

/** What matters of a `pre_tokenizer` to the pieces, as text: splits, digits and ByteLevel, or undefined where there is more to it. */
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
