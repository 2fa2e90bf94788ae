/** @file The fields of requests: those that the endpoints share, and what is wrong with all that an endpoint does not support. */
import { nearestName } from '@moe/core'
import { z } from 'zod'
import { ApiError } from './errors.ts'
import { type UnsupportedField, unsupportedFields } from './unsupported-fields.ts'

/** Maximum number of texts of one request: prompts times choices. */
export const MAX_TEXTS = 64

/** Maximum number of messages of a conversation: rendering tens of thousands would block the server for seconds. */
export const MAX_MESSAGES = 4096

/** As in OpenAI's API. */
export const MAX_TOOLS = 128

/** OpenAI's limit is 4, but evaluations of generated programs use more. */
const MAX_STOPS = 16

/** A list of `least` to `most` items. Its length is checked first, because each invalid item of a long list would take time. */
export const list = <Item extends z.ZodType>(item: Item, most: number, least = 0) =>
  z.array(z.unknown()).min(least).max(most).pipe(z.array(item))

const isBias = (given: unknown) =>
  typeof given === 'object' &&
  given !== null &&
  !Array.isArray(given) &&
  Object.entries(given).every(
    ([id, bias]) => /^(0|[1-9]\d*)$/.test(id) && typeof bias === 'number' && Math.abs(bias) <= 100,
  )

const count = z.int().nonnegative()
const stopText = z.string().min(1)
const penalty = z.number().min(-2).max(2)

/** `null` means that a field is not set. */
export const sharedFields = {
  model: z.string().nullish(),
  stream: z.boolean().nullish(),
  stream_options: z
    .strictObject({
      include_usage: z.boolean().nullish(),
      include_obfuscation: z.literal(false, 'is not supported: omit it').nullish(),
    })
    .nullish(),
  n: z.int().min(1).max(MAX_TEXTS).nullish(),
  max_tokens: count.nullish(),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().min(0).max(1).nullish(),
  // To disable top-k, clients of vLLM send -1, those of llama.cpp 0.
  top_k: z.int().min(-1).nullish(),
  min_p: z.number().min(0).max(1).nullish(),
  repetition_penalty: z.number().positive().nullish(),
  frequency_penalty: penalty.nullish(),
  presence_penalty: penalty.nullish(),
  logit_bias: z
    .custom<Record<string, number>>(isBias, { error: 'expected numbers from -100 to 100 by token id' })
    .nullish(),
  // Not z.int(): 64-bit seeds exceed the safe integers, and lose their last bits in JSON.
  seed: z.number().refine(Number.isInteger, 'expected an integer').nullish(),
  stop: z
    .union([stopText, z.array(stopText).max(MAX_STOPS)], {
      error: `expected a non-empty string or up to ${MAX_STOPS} of them`,
    })
    .nullish(),
}

/** For endpoints of OpenAI that store responses. */
export const storeField = z.literal(false, 'this server stores nothing: send store: false, or omit it').nullish()

const shared = z.object(sharedFields)
export type SharedFields = z.output<typeof shared>

/** Fields that have no influence on an answer of this server, with any value. */
const ignoredFields: ReadonlySet<string> = new Set([
  // Identify the user, or describe the request for later.
  'user',
  'safety_identifier',
  'metadata',
  // Speed and price. The cache of prompts is always used, and needs no key.
  'service_tier',
  'prompt_cache_key',
  'prompt_cache_options',
  'prompt_cache_retention',
  'cache_prompt',
  'prediction',
  // Limits calls of tools that the server itself would run.
  'max_tool_calls',
])

/**
 * Validates the fields of a request body.
 * @param renamed what fields of other endpoints are called here
 * @throws ApiError 400 with the name of an invalid, unsupported or unknown field
 */
export function parseFields<Schema extends z.ZodObject>(
  schema: Schema,
  body: unknown,
  renamed: Readonly<Record<string, string>> = {},
): z.output<Schema> {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    const kind = body === null ? 'null' : Array.isArray(body) ? 'an array' : `a ${typeof body}`
    throw new ApiError(400, `the request body is ${kind}: send a JSON object`)
  }
  for (const [name, value] of Object.entries(body)) {
    if (value === null || Object.hasOwn(schema.shape, name) || ignoredFields.has(name)) continue
    if (Object.hasOwn(renamed, name)) throw unsupported(name, `is called ${renamed[name]} here`)
    if (!Object.hasOwn(unsupportedFields, name)) throw unknownField(name, schema.shape)
    const { isNoop, problem }: UnsupportedField = unsupportedFields[name]
    if (!isNoop(value, body)) throw unsupported(name, problem)
  }
  const result = schema.safeParse(body)
  if (result.success) return result.data
  const [{ path, message }] = result.error.issues
  const param = path
    .map((key, i) => (typeof key === 'number' ? `[${key}]` : `${i > 0 ? '.' : ''}${String(key)}`))
    .join('')
  throw new ApiError(400, `${param}: ${message}`, { param })
}

const unsupported = (name: string, problem: string) =>
  new ApiError(400, `${name} ${problem}`, { param: name, code: 'unsupported_parameter' })

function unknownField(given: string, known: object): ApiError {
  const name = given.slice(0, 100)
  const near = nearestName(name, known)
  const fix = near === undefined ? 'omit it' : `did you mean ${near}?`
  return new ApiError(400, `unknown field ${JSON.stringify(name)}: ${fix}`, { param: name, code: 'unknown_parameter' })
}
