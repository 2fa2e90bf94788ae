/** @file Request fields that the endpoints share, and unsupported fields that are rejected because ignoring them would change the answer. */
import { z } from 'zod'
import { ApiError } from './errors.ts'

/** Maximum number of texts of one request: prompts times choices. */
export const MAX_TEXTS = 64

/** OpenAI's limit is 4, but evaluations of generated programs use more. */
const MAX_STOPS = 16

const count = z.int().nonnegative()
const stopText = z.string().min(1)

/** `null` means that a field is not set. */
export const sharedFields = {
  model: z.string().nullish(),
  stream: z.boolean().nullish(),
  stream_options: z.object({ include_usage: z.boolean().nullish() }).nullish(),
  n: z.int().min(1).max(MAX_TEXTS).nullish(),
  max_tokens: count.nullish(),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().min(0).max(1).nullish(),
  // To disable top-k, clients of vLLM send -1, those of llama.cpp 0.
  top_k: z.int().min(-1).nullish(),
  min_p: z.number().min(0).max(1).nullish(),
  repetition_penalty: z.number().positive().nullish(),
  // Not z.int(): 64-bit seeds exceed the safe integers, and lose their last bits in JSON.
  seed: z.number().refine(Number.isInteger, 'expected an integer').nullish(),
  stop: z
    .union([stopText, z.array(stopText).max(MAX_STOPS)], {
      error: `expected a non-empty string or up to ${MAX_STOPS} of them`,
    })
    .nullish(),
}

const shared = z.object(sharedFields)
export type SharedFields = z.output<typeof shared>

interface UnsupportedField {
  /** Whether a value has no effect and is therefore accepted, as null always is. */
  readonly isNoop: (value: unknown) => boolean
  readonly problem: string
}

const is =
  (...values: unknown[]) =>
  (value: unknown) =>
    values.includes(value)
const isEmpty = (value: unknown) => typeof value === 'object' && Object.keys(value as object).length === 0
const isTextOnly = (value: unknown) => Array.isArray(value) && value.every(item => item === 'text')
const isPlainText = (value: unknown) =>
  typeof value === 'object' && (value as { type?: unknown } | null)?.type === 'text'

const noPenalty: UnsupportedField = { isNoop: is(0), problem: 'is not supported: omit it, or use repetition_penalty' }
const noTools: UnsupportedField = {
  isNoop: isEmpty,
  problem: 'is not supported here: use tools of /v1/chat/completions',
}
const noFormat: UnsupportedField = {
  isNoop: isPlainText,
  problem: 'is not supported here: use response_format of /v1/chat/completions',
}
const notSupported: UnsupportedField = { isNoop: () => false, problem: 'is not supported: omit it' }

const unsupportedFields: Readonly<Record<string, UnsupportedField>> = {
  top_logprobs: { isNoop: is(0), problem: 'is not supported here: set logprobs to a number' },
  prompt_logprobs: { isNoop: is(false), problem: 'is not supported: use echo and logprobs of /v1/completions' },
  presence_penalty: noPenalty,
  frequency_penalty: noPenalty,
  repeat_penalty: { isNoop: is(1), problem: 'is called repetition_penalty here' },
  logit_bias: { isNoop: isEmpty, problem: 'is not supported: omit it' },
  tools: noTools,
  functions: noTools,
  tool_choice: { ...noTools, isNoop: is('none', 'auto') },
  function_call: { ...noTools, isNoop: is('none', 'auto') },
  web_search_options: noTools,
  response_format: noFormat,
  grammar: { ...noFormat, isNoop: is('') },
  json_schema: noFormat,
  guided_json: noFormat,
  guided_regex: noFormat,
  guided_choice: noFormat,
  guided_grammar: noFormat,
  structured_outputs: noFormat,
  modalities: { isNoop: isTextOnly, problem: 'is not supported: this server generates only text' },
  audio: { ...notSupported, problem: 'is not supported: this server generates only text' },
  moderation: notSupported,
  best_of: { isNoop: is(1), problem: 'is not supported: use n, and select the best choice in the client' },
  echo: { isNoop: is(false), problem: 'is not supported here: use /v1/completions' },
  suffix: { isNoop: is(''), problem: "is not supported: write the model's fill-in-the-middle tokens into the prompt" },
  min_tokens: { isNoop: is(0), problem: 'is not supported: omit it' },
  ignore_eos: { isNoop: is(false), problem: 'is not supported: omit it' },
  stop_token_ids: { isNoop: isEmpty, problem: 'is not supported: use stop, which takes strings' },
  bad_words: { isNoop: isEmpty, problem: 'is not supported: omit it' },
  use_beam_search: { isNoop: is(false), problem: 'is not supported: omit it' },
  chat_template: { ...notSupported, problem: 'is not supported: it is set when the server starts' },
  chat_template_kwargs: { ...notSupported, isNoop: isEmpty },
  continue_final_message: { isNoop: is(false), problem: 'is not supported: use /v1/completions' },
  add_generation_prompt: { isNoop: is(true), problem: 'is not supported: use /v1/completions' },
}

/**
 * Validates the fields of a request body. Unknown fields are ignored.
 * @throws ApiError 400 with the name of an invalid or unsupported field
 */
export function parseFields<Schema extends z.ZodObject>(schema: Schema, body: unknown): z.output<Schema> {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    const kind = body === null ? 'null' : Array.isArray(body) ? 'an array' : `a ${typeof body}`
    throw new ApiError(400, `the request body is ${kind}: send a JSON object`)
  }
  for (const [name, value] of Object.entries(body)) {
    if (!Object.hasOwn(unsupportedFields, name) || Object.hasOwn(schema.shape, name)) continue
    const { isNoop, problem } = unsupportedFields[name]
    if (value === null || isNoop(value)) continue
    throw new ApiError(400, `${name} ${problem}`, { param: name, code: 'unsupported_parameter' })
  }
  const result = schema.safeParse(body)
  if (result.success) return result.data
  const [{ path, message }] = result.error.issues
  const param = path
    .map((key, i) => (typeof key === 'number' ? `[${key}]` : `${i > 0 ? '.' : ''}${String(key)}`))
    .join('')
  throw new ApiError(400, `${param}: ${message}`, { param })
}
