/** @file Converts tokenizer.json to the `tokenizer.*` metadata of llama.cpp, for byte-level BPE (`gpt2`). */
import { createHash } from 'node:crypto'
import type { GgufValue } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { z } from 'zod'
import { type DeepSeekConfig, endTokens } from '../config.ts'

/** The files of a tokenizer. */
export interface TokenizerFiles {
  /** The content of tokenizer.json. */
  readonly tokenizer: unknown
  /** The content of tokenizer_config.json, if it exists. */
  readonly tokenizerConfig?: unknown
  /** Jinja chat template, which takes precedence over that of tokenizer_config.json. */
  readonly chatTemplate?: string
  /** llama.cpp's name of the pre-tokenizer, if it is not recognized. */
  readonly preTokenizer?: string
}

export interface Vocabulary {
  readonly metadata: Readonly<Record<string, GgufValue>>
  readonly notes: readonly string[]
}

/** Metadata of a file without a vocabulary, with which llama.cpp accepts and returns ids only. */
export const noVocabulary: Vocabulary = {
  metadata: { 'tokenizer.ggml.model': { type: 'string', value: 'none' } },
  notes: ['the file has no vocabulary: only programs that pass token ids to libllama can use it'],
}

/** llama.cpp's `llama_token_type`. */
const NORMAL = 1
const CONTROL = 3
const USER_DEFINED = 4
const UNUSED = 5

const tokenizerFile = z.object({
  normalizer: z.unknown().optional(),
  pre_tokenizer: z.unknown().optional(),
  post_processor: z.unknown().optional(),
  added_tokens: z
    .array(z.object({ id: z.int().nonnegative(), content: z.string(), special: z.boolean().default(false) }))
    .nullish()
    .transform(tokens => tokens ?? []),
  model: z.object({
    type: z.literal('BPE').optional(),
    vocab: z.custom<Readonly<Record<string, number>>>(isVocabulary, 'must give each token an id'),
    ignore_merges: z.boolean().nullish(),
    merges: z.array(z.union([z.string(), z.tuple([z.string(), z.string()])])),
  }),
})

/** Not a zod record, which would drop the token `__proto__`. */
function isVocabulary(value: unknown): boolean {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return false
  return Object.values(value).every(id => Number.isSafeInteger(id) && id >= 0)
}

const tokenizerConfigFile = z.object({
  add_bos_token: z.boolean().nullish(),
  add_eos_token: z.boolean().nullish(),
  chat_template: z.union([z.string(), z.array(z.object({ name: z.string(), template: z.string() }))]).nullish(),
})

/**
 * Returns the `tokenizer.*` metadata: tokens up to the model's vocab_size (ids without a token are padded), their types, merges, special ids, and the chat template.
 *
 * @throws {MoeError} `E_UNSUPPORTED` for a tokenizer that is not a byte-level BPE, has ids beyond the model's vocabulary, or has a pre-tokenizer that llama.cpp does not support
 */
export function vocabularyOf(config: DeepSeekConfig, files: TokenizerFiles): Vocabulary {
  const file = parsed('tokenizer.json', tokenizerFile, files.tokenizer)
  const settings = parsed('tokenizer_config.json', tokenizerConfigFile, files.tokenizerConfig ?? {})
  const { tokens, kinds } = tokensOf(file, config.vocab_size)
  const template = files.chatTemplate ?? templateOf(settings.chat_template)
  const [end, endOfTurn, endOfMessage] = endTokens(config)
  const ids = {
    bos_token_id: config.bos_token_id ?? undefined,
    eos_token_id: end,
    eot_token_id: endOfTurn,
    eom_token_id: endOfMessage,
  }
  const metadata: Record<string, GgufValue> = {
    'tokenizer.ggml.model': { type: 'string', value: 'gpt2' },
    'tokenizer.ggml.pre': { type: 'string', value: files.preTokenizer ?? preTokenizerOf(file) },
    'tokenizer.ggml.tokens': { type: 'array', of: 'string', value: tokens },
    'tokenizer.ggml.token_type': { type: 'array', of: 'i32', value: kinds },
    'tokenizer.ggml.merges': {
      type: 'array',
      of: 'string',
      value: file.model.merges.map(merge => (typeof merge === 'string' ? merge : merge.join(' '))),
    },
    'tokenizer.ggml.add_bos_token': {
      type: 'bool',
      value: settings.add_bos_token ?? startsWithSpecial(file.post_processor),
    },
    'tokenizer.ggml.add_eos_token': { type: 'bool', value: settings.add_eos_token ?? false },
  }
  for (const [name, value] of Object.entries(ids)) {
    if (value !== undefined) metadata[`tokenizer.ggml.${name}`] = { type: 'u32', value }
  }
  if (template !== undefined) metadata['tokenizer.chat_template'] = { type: 'string', value: template }
  return { metadata, notes: notesOf(config, file) }
}

function parsed<T extends z.ZodType>(name: string, schema: T, content: unknown): z.output<T> {
  const result = schema.safeParse(content)
  if (result.success) return result.data
  const [{ path, message }] = result.error.issues
  throw unsupported(
    `${name} is invalid at ${path.join('.').slice(0, 100) || 'the top level'}: ${message.slice(0, 200)}`,
    'use a byte-level BPE tokenizer of @moe/tokenizer-bpe or Hugging Face tokenizers',
  )
}

function tokensOf({ model, added_tokens: added }: z.output<typeof tokenizerFile>, size: number) {
  const tokens: string[] = Array.from({ length: size }, (_, id) => `[PAD${id}]`)
  const kinds = new Int32Array(size).fill(UNUSED)
  const put = (id: number, token: string, kind: number) => {
    if (id >= size) {
      throw unsupported(
        `the tokenizer has the id ${id}, beyond the model's vocab_size of ${size}`,
        'use the tokenizer that the model was trained with',
      )
    }
    tokens[id] = token
    kinds[id] = kind
  }
  for (const [token, id] of Object.entries(model.vocab)) put(id, token, NORMAL)
  for (const { id, content, special } of added) put(id, content, special ? CONTROL : USER_DEFINED)
  return { tokens, kinds }
}

function templateOf(found: z.output<typeof tokenizerConfigFile>['chat_template']): string | undefined {
  if (found == null || typeof found === 'string') return found ?? undefined
  return (found.find(({ name }) => name === 'default') ?? found[0])?.template
}

/** Whether a TemplateProcessing adds a special token before a text. */
function startsWithSpecial(processor: unknown): boolean {
  const { type, single, processors } = (processor ?? {}) as Record<string, unknown>
  if (type === 'Sequence' && Array.isArray(processors)) return processors.some(startsWithSpecial)
  return type === 'TemplateProcessing' && Array.isArray(single) && 'SpecialToken' in Object(single[0])
}

function notesOf(config: DeepSeekConfig, { normalizer }: z.output<typeof tokenizerFile>): string[] {
  const notes: string[] = []
  const { type, normalizers } = (normalizer ?? {}) as Record<string, unknown>
  const nothing = normalizer == null || (type === 'Sequence' && Array.isArray(normalizers) && normalizers.length === 0)
  if (!nothing) notes.push("the tokenizer's normalizer is not exported: llama.cpp has none for byte-level BPE")
  if (endTokens(config).length === 0) notes.push('config.json has no eos_token_id: llama.cpp uses token 11')
  if (endTokens(config).length > 3) notes.push('only the first three ids of eos_token_id are exported')
  return notes
}

/**
 * llama.cpp's names of pre-tokenizers, by a digest of their steps: regular expressions, `D` for single digits, `G` for the regular expression of ByteLevel.
 */
const knownPreTokenizers: Readonly<Record<string, string>> = {
  f4c8a397aaf869a6: 'deepseek-v3',
  '70da7265774549f4': 'deepseek-llm',
  b3999270b03c360b: 'gpt-2',
  '8775b52759d436ff': 'gpt-2', // spelled out as a Split
  '1c97e51da1d8a4fd': 'dbrx', // cl100k, that of Llama 3
  a90ce5a037e4f870: 'gpt-4o', // o200k
  '5686f2ec21bd1aa9': 'qwen2',
}

/** @internal Returns a digest of the steps of a `pre_tokenizer` of tokenizer.json, or undefined if there are others than Split, Digits and ByteLevel. */
export function preTokenizerDigest(preTokenizer: unknown): string | undefined {
  const steps: string[] = []
  const walk = (value: unknown): boolean => {
    const step = (value ?? {}) as Record<string, unknown>
    if (step.type === 'Sequence') return Array.isArray(step.pretokenizers) && step.pretokenizers.every(walk)
    if (step.type === 'ByteLevel') {
      if (step.use_regex ?? true) steps.push('G')
      return step.add_prefix_space === false
    }
    if (step.type === 'Digits') steps.push(step.individual_digits === true ? 'D' : 'd')
    else if (step.type === 'Split') {
      steps.push(`${step.behavior} ${step.invert} ${(step.pattern as { Regex?: unknown } | undefined)?.Regex}`)
    } else return false
    return true
  }
  if (!walk(preTokenizer)) return undefined
  return createHash('sha256').update(JSON.stringify(steps)).digest('hex').slice(0, 16)
}

function preTokenizerOf({ pre_tokenizer, model }: z.output<typeof tokenizerFile>): string {
  const digest = preTokenizerDigest(pre_tokenizer)
  const name = digest === undefined ? undefined : knownPreTokenizers[digest]
  // The same pre-tokenizer, but pieces that are tokens are not merged.
  if (name === 'dbrx' && model.ignore_merges) return 'llama-bpe'
  if (name !== undefined) return name
  throw unsupported(
    `llama.cpp has no known equivalent of the pre_tokenizer in tokenizer.json (digest ${digest})`,
    "pass { preTokenizer } with llama.cpp's name for it (src/llama-vocab.cpp), for example 'default'",
  )
}

const unsupported = (problem: string, fix: string) =>
  new MoeError({ code: 'E_UNSUPPORTED', op: 'exportGguf', problem, fix })
