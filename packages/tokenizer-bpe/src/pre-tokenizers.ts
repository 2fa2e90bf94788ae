/** @file The pre-tokenizers by name: their scanners, and how tokenizer.json spells them. */
import { CL100K_PATTERN, CL100K_TIKTOKEN_PATTERN, cl100kScanner, QWEN2_PATTERN } from './scan/cl100k.ts'
import { DEEPSEEK_LLM_PATTERNS, scanDeepseekLlm } from './scan/deepseek-llm.ts'
import { DEEPSEEK_V3_PATTERNS, scanDeepseekV3 } from './scan/deepseek-v3.ts'
import { GPT2_PATTERN, scanGpt2 } from './scan/gpt2.ts'
import { O200K_PATTERN, scanO200k } from './scan/o200k.ts'
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

interface Known {
  readonly scanner: Scanner
  /** Regular expressions of the `Split` steps, each isolated; none for a ByteLevel that brings its own. */
  readonly patterns: readonly string[]
  /** Whether each digit becomes a piece of its own after the splits. */
  readonly digits?: boolean
}

export const KNOWN: Readonly<Record<PreTokenizerName, Known>> = {
  'deepseek-v3': { scanner: scanDeepseekV3, patterns: DEEPSEEK_V3_PATTERNS },
  'deepseek-llm': { scanner: scanDeepseekLlm, patterns: DEEPSEEK_LLM_PATTERNS, digits: true },
  gpt2: { scanner: scanGpt2, patterns: [] },
  cl100k: { scanner: cl100kScanner(3, false), patterns: [CL100K_PATTERN] },
  'cl100k-tiktoken': { scanner: cl100kScanner(3, true), patterns: [CL100K_TIKTOKEN_PATTERN] },
  o200k: { scanner: scanO200k, patterns: [O200K_PATTERN] },
  qwen2: { scanner: cl100kScanner(1, false), patterns: [QWEN2_PATTERN] },
}

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

/** The name of the scanner that does what a `pre_tokenizer` of tokenizer.json says, if there is one. */
export function recognize(json: unknown): PreTokenizerName | undefined {
  const key = signature(json)
  if (key === undefined) return undefined
  for (const name of Object.keys(KNOWN) as PreTokenizerName[]) {
    const known = KNOWN[name]
    if (signature(preTokenizerJson(known.patterns, known.digits)) === key) return name
  }
  return key === signature(preTokenizerJson([GPT2_PATTERN])) ? 'gpt2' : undefined
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
