/** @file A tokenizer.json in the terms of llama.cpp: `tokenizer.*` keys of a byte-level BPE (`gpt2`). */
import { createHash } from 'node:crypto'
import type { GgufValue } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { z } from 'zod'
import { type DeepSeekConfig, endTokens } from '../config.ts'

/** What tokenizer.json and tokenizer_config.json say, as far as llama.cpp wants to know. */
export interface TokenizerFiles {
  /** The content of tokenizer.json. */
  readonly tokenizer: unknown
  /** The content of tokenizer_config.json, if there is one. */
  readonly tokenizerConfig?: unknown
  /** Jinja text that writes a conversation; goes before that of tokenizer_config.json. */
  readonly chatTemplate?: string
  /** llama.cpp's name of the pre-tokenizer, where it is not recognized. */
  readonly preTokenizer?: string
}

export interface Vocabulary {
  readonly metadata: Readonly<Record<string, GgufValue>>
  readonly notes: readonly string[]
}

/** A file without a vocabulary: llama.cpp takes and gives ids. */
export const noVocabulary: Vocabulary = {
  metadata: { 'tokenizer.ggml.model': { type: 'string', value: 'none' } },
  notes: ['there is no vocabulary: only programs that give libllama ids can run the file'],
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

/** Not a record of zod: that leaves out the token `__proto__`. */
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
 * The `tokenizer.*` keys: tokens up to the model's vocab_size (what the tokenizer lacks is padded), their kinds, merges, special ids, the
 * chat template.
 *
 * @throws {MoeError} `E_UNSUPPORTED` for a tokenizer that is no byte-level BPE, that has more ids than the model, or whose pre-tokenizer
 *   llama.cpp has no name for
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
    `${name} at ${path.join('.').slice(0, 100) || 'the top'}: ${message.slice(0, 200)}`,
    'llama.cpp needs a byte-level BPE, as @moe/tokenizer-bpe and Hugging Face tokenizers write it',
  )
}

function tokensOf({ model, added_tokens: added }: z.output<typeof tokenizerFile>, size: number) {
  const tokens: string[] = Array.from({ length: size }, (_, id) => `[PAD${id}]`)
  const kinds = new Int32Array(size).fill(UNUSED)
  const put = (id: number, token: string, kind: number) => {
    if (id >= size) {
      throw unsupported(
        `the tokenizer has the id ${id}, the model a vocab_size of ${size}`,
        'export with the tokenizer that the model was trained with',
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

/** Whether a TemplateProcessing puts a special token in front of a text. */
function startsWithSpecial(processor: unknown): boolean {
  const { type, single, processors } = (processor ?? {}) as Record<string, unknown>
  if (type === 'Sequence' && Array.isArray(processors)) return processors.some(startsWithSpecial)
  return type === 'TemplateProcessing' && Array.isArray(single) && 'SpecialToken' in Object(single[0])
}

function notesOf(config: DeepSeekConfig, { normalizer }: z.output<typeof tokenizerFile>): string[] {
  const notes: string[] = []
  const { type, normalizers } = (normalizer ?? {}) as Record<string, unknown>
  const nothing = normalizer == null || (type === 'Sequence' && Array.isArray(normalizers) && normalizers.length === 0)
  if (!nothing) notes.push('the normalizer of the tokenizer is left out: llama.cpp has none for byte-level BPE')
  if (endTokens(config).length === 0) notes.push('config.json has no eos_token_id: llama.cpp takes token 11 for it')
  if (endTokens(config).length > 3) notes.push('of the eos_token_id the first three are kept')
  return notes
}

/**
 * llama.cpp's names of pre-tokenizers, by a digest of their steps: regular expressions, `D` for single digits, `G` for the one that
 * ByteLevel brings along.
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

/** @internal A digest of what a `pre_tokenizer` of tokenizer.json does; undefined for steps other than Split, Digits and ByteLevel. */
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
  // The same pieces, and whole pieces that are tokens stay whole.
  if (name === 'dbrx' && model.ignore_merges) return 'llama-bpe'
  if (name !== undefined) return name
  throw unsupported(
    `the pre_tokenizer of tokenizer.json (digest ${digest}) is none that llama.cpp is known to have`,
    "pass { preTokenizer } with llama.cpp's name for it (src/llama-vocab.cpp), such as 'default'",
  )
}

const unsupported = (problem: string, fix: string) =>
  new MoeError({ code: 'E_UNSUPPORTED', op: 'exportGguf', problem, fix })
