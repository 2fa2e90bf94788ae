/**
 * @file Features that only some tokenizers need. Browsers load the code of one when a file requires it. Outside of
 * browsers all are registered at once (index.ts), and training registers those of all-features.ts. The module of a
 * feature exports `features`: implementations by name.
 */
import type { TokenLookup } from './bpe/token-lookup.ts'
import type { readText, writeText } from './files.ts'
import { unsupported } from './json/check.ts'
import type { readTemplate } from './json/template.ts'
import type { Normalizer } from './normalizer.ts'
import type { PreTokenizer } from './pre-tokenizer.ts'
import type { KnownPreTokenizer, PreTokenizerName } from './pre-tokenizers.ts'
import type { readTiktoken } from './tiktoken.ts'
import { isFilled } from './unicode/classes.ts'
import { fillFromEngine } from './unicode/engine-classes.ts'

export interface Features extends Record<PreTokenizerName, KnownPreTokenizer> {
  /** Pre-tokenizers without a hand-written scanner. */
  readonly steps: (json: unknown) => PreTokenizer
  readonly normalizer: (json: unknown) => Normalizer | undefined
  /** For `ignore_merges`. */
  readonly tokenLookup: typeof TokenLookup
  /** The post-processor TemplateProcessing. */
  readonly template: typeof readTemplate
  readonly tiktoken: typeof readTiktoken
  /** Not available in browsers. */
  readonly files: { readonly readText: typeof readText; readonly writeText: typeof writeText }
}

/** Features that can be loaded. */
export type FeatureName = Exclude<keyof Features, 'files'>

const cl100k = () => import('./scan/cl100k.ts')

const MODULES: Record<FeatureName, () => Promise<{ features: Partial<Features> }>> = {
  'deepseek-v3': () => import('./scan/deepseek-v3.ts'),
  'deepseek-llm': () => import('./scan/deepseek-llm.ts'),
  gpt2: () => import('./scan/gpt2.ts'),
  cl100k,
  'cl100k-tiktoken': cl100k,
  qwen2: cl100k,
  o200k: () => import('./scan/o200k.ts'),
  steps: () => import('./json/pre-tokenizer-steps.ts'),
  normalizer: () => import('./normalizer.ts'),
  tokenLookup: () => import('./bpe/token-lookup.ts'),
  template: () => import('./json/template.ts'),
  tiktoken: () => import('./tiktoken.ts'),
}

const registered: Partial<Features> = {}

export function register(features: Partial<Features>): void {
  Object.assign(registered, features)
}

/** @throws TokenizerError E_UNSUPPORTED if the feature is not loaded */
export function feature<Name extends keyof Features>(name: Name): Features[Name] {
  const found = registered[name] as Features[Name] | undefined
  if (found === undefined) {
    throw unsupported(name, 'code not loaded in this browser', 'use fromJSONAsync or fromTiktokenAsync')
  }
  return found
}

/** Loads features, ignoring unknown names, and the code point classes that all of them use. */
export async function loadFeatures(...names: readonly FeatureName[]): Promise<void> {
  if (!isFilled() && !fillFromEngine()) (await import('./unicode/pinned-classes.ts')).fillFromTable()
  await Promise.all(names.map(async name => registered[name] ?? register((await MODULES[name]?.())?.features ?? {})))
}
