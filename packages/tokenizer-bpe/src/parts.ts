/**
 * @file Code that only some tokenizers need. Browsers fetch such a part when a file requires it; elsewhere, and for training, all-parts.ts provides all of them. The
 * module of a part exports `parts`: what it provides, by name.
 */
import type { WholeTable } from './bpe/whole-table.ts'
import type { readText, writeText } from './files.ts'
import { unsupported } from './json/check.ts'
import type { PreTokenizer } from './json/pre-tokenizer.ts'
import type { readTemplate } from './json/template.ts'
import type { Normalizer } from './normalizer.ts'
import type { KnownPreTokenizer, PreTokenizerName } from './pre-tokenizers.ts'
import type { readTiktoken } from './tiktoken.ts'
import { isFilled } from './unicode/classes.ts'
import { askEngine } from './unicode/engine-classes.ts'

export interface Parts extends Record<PreTokenizerName, KnownPreTokenizer> {
  /** Pre-tokenizers without a hand-written scanner. */
  readonly steps: (json: unknown) => PreTokenizer
  readonly normalizer: (json: unknown) => Normalizer | undefined
  /** For `ignore_merges`. */
  readonly whole: typeof WholeTable
  /** The post-processor TemplateProcessing. */
  readonly template: typeof readTemplate
  readonly tiktoken: typeof readTiktoken
  /** Not available in browsers. */
  readonly files: { readonly readText: typeof readText; readonly writeText: typeof writeText }
}

/** Parts that can be fetched. */
export type PartName = Exclude<keyof Parts, 'files'>

const cl100k = () => import('./scan/cl100k.ts')

const FILES: Record<PartName, () => Promise<{ parts: Partial<Parts> }>> = {
  'deepseek-v3': () => import('./scan/deepseek-v3.ts'),
  'deepseek-llm': () => import('./scan/deepseek-llm.ts'),
  gpt2: () => import('./scan/gpt2.ts'),
  cl100k,
  'cl100k-tiktoken': cl100k,
  qwen2: cl100k,
  o200k: () => import('./scan/o200k.ts'),
  steps: () => import('./json/pre-tokenizer-steps.ts'),
  normalizer: () => import('./normalizer.ts'),
  whole: () => import('./bpe/whole-table.ts'),
  template: () => import('./json/template.ts'),
  tiktoken: () => import('./tiktoken.ts'),
}

const have: Partial<Parts> = {}

export function provide(parts: Partial<Parts>): void {
  Object.assign(have, parts)
}

/** @throws TokenizerError E_UNSUPPORTED if the part has not been fetched */
export function part<Name extends keyof Parts>(name: Name): Parts[Name] {
  const found = have[name] as Parts[Name] | undefined
  if (found === undefined) {
    throw unsupported(name, 'code not fetched in this browser', 'use fromJSONAsync or fromTiktokenAsync')
  }
  return found
}

/** Registers parts, and the code point classes that all of them use. */
export async function fetchParts(...names: readonly PartName[]): Promise<void> {
  if (!isFilled() && !askEngine()) (await import('./unicode/pinned-classes.ts')).fillClasses()
  await Promise.all(names.map(async name => have[name] ?? provide((await FILES[name]?.())?.parts ?? {})))
}
