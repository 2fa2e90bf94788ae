/** @file The fields of a request that both endpoints have, and those that are refused where an endpoint does not have them: what would change the answer and is not done. */
import { z } from 'zod'
import { ApiError } from './errors.ts'

/** Most texts of one request: choices times prompts. */
export const MOST_TEXTS = 64

/** Four at OpenAI, where evaluations of programs have more. */
const MOST_STOPS = 16

const count = z.int().nonnegative()
const stopText = z.string().min(1)

/** What is null is not given. */
export const sharedFields = {
  model: z.string().nullish(),
  stream: z.boolean().nullish(),
  stream_options: z.object({ include_usage: z.boolean().nullish() }).nullish(),
  n: z.int().min(1).max(MOST_TEXTS).nullish(),
  max_tokens: count.nullish(),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().min(0).max(1).nullish(),
  // vLLM writes -1 for all tokens, llama.cpp 0.
  top_k: z.int().min(-1).nullish(),
  min_p: z.number().min(0).max(1).nullish(),
  repetition_penalty: z.number().positive().nullish(),
  // 64-bit seeds lose their last bits to JSON.
  seed: z.number().refine(Number.isInteger, 'expected an integer').nullish(),
  stop: z
    .union([stopText, z.array(stopText).max(MOST_STOPS)], {
      error: `expected a text that is not empty, or up to ${MOST_STOPS} of them`,
    })
    .nullish(),
}

const shared = z.object(sharedFields)
export type SharedFields = z.output<typeof shared>

interface Refused {
  /** Values that ask for nothing, besides null. */
  readonly idle: (value: unknown) => boolean
  readonly says: string
}

const is =
  (...values: unknown[]) =>
  (value: unknown) =>
    values.includes(value)
const isEmpty = (value: unknown) => typeof value === 'object' && Object.keys(value as object).length === 0
const isTextOnly = (value: unknown) => Array.isArray(value) && value.every(item => item === 'text')
const isPlainText = (value: unknown) =>
  typeof value === 'object' && (value as { type?: unknown } | null)?.type === 'text'

const noPenalty: Refused = { idle: is(0), says: 'is not supported: leave it out, or use repetition_penalty' }
const noTools: Refused = { idle: isEmpty, says: 'is not supported here: use tools of /v1/chat/completions' }
const noFormat: Refused = {
  idle: isPlainText,
  says: 'is not supported here: use response_format of /v1/chat/completions',
}
const notSupported: Refused = { idle: () => false, says: 'is not supported: leave it out' }

const refused: Readonly<Record<string, Refused>> = {
  top_logprobs: { idle: is(0), says: 'is not supported here: use logprobs, which takes a number' },
  prompt_logprobs: { idle: is(false), says: 'is not supported: use echo and logprobs of /v1/completions' },
  presence_penalty: noPenalty,
  frequency_penalty: noPenalty,
  repeat_penalty: { idle: is(1), says: 'is called repetition_penalty here' },
  logit_bias: { idle: isEmpty, says: 'is not supported: leave it out' },
  tools: noTools,
  functions: noTools,
  tool_choice: { ...noTools, idle: is('none', 'auto') },
  function_call: { ...noTools, idle: is('none', 'auto') },
  web_search_options: noTools,
  response_format: noFormat,
  grammar: { ...noFormat, idle: is('') },
  json_schema: noFormat,
  guided_json: noFormat,
  guided_regex: noFormat,
  guided_choice: noFormat,
  guided_grammar: noFormat,
  structured_outputs: noFormat,
  modalities: { idle: isTextOnly, says: 'is not supported: there is text only' },
  audio: { ...notSupported, says: 'is not supported: there is text only' },
  moderation: notSupported,
  best_of: { idle: is(1), says: 'is not supported: use n, and choose yourself' },
  echo: { idle: is(false), says: 'is not supported here: use /v1/completions' },
  suffix: { idle: is(''), says: "is not supported: write the model's own tokens for filling in into the prompt" },
  min_tokens: { idle: is(0), says: 'is not supported: leave it out' },
  ignore_eos: { idle: is(false), says: 'is not supported: leave it out' },
  stop_token_ids: { idle: isEmpty, says: 'is not supported: use stop, which takes texts' },
  bad_words: { idle: isEmpty, says: 'is not supported: leave it out' },
  use_beam_search: { idle: is(false), says: 'is not supported: leave it out' },
  chat_template: { ...notSupported, says: 'is not supported: it is chosen where the server starts' },
  chat_template_kwargs: { ...notSupported, idle: isEmpty },
  continue_final_message: { idle: is(false), says: 'is not supported: use /v1/completions' },
  add_generation_prompt: { idle: is(true), says: 'is not supported: use /v1/completions' },
}

/**
 * The fields of a body; names that nobody knows are ignored.
 * @throws ApiError 400 that names the field
 */
export function parseFields<Schema extends z.ZodObject>(schema: Schema, body: unknown): z.output<Schema> {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    const kind = body === null ? 'null' : Array.isArray(body) ? 'an array' : `a ${typeof body}`
    throw new ApiError(400, `the body is ${kind}: send a JSON object`)
  }
  for (const [name, value] of Object.entries(body)) {
    const refusal = Object.hasOwn(refused, name) && !Object.hasOwn(schema.shape, name) ? refused[name] : undefined
    if (refusal === undefined || value === null || refusal.idle(value)) continue
    throw new ApiError(400, `${name} ${refusal.says}`, { param: name, code: 'unsupported_parameter' })
  }
  const result = schema.safeParse(body)
  if (result.success) return result.data
  const [{ path, message }] = result.error.issues
  const param = path
    .map((key, i) => (typeof key === 'number' ? `[${key}]` : `${i > 0 ? '.' : ''}${String(key)}`))
    .join('')
  throw new ApiError(400, `${param}: ${message}`, { param })
}
