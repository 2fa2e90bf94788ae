/** @file Converts the fields of a request to the arguments of the engine. */
import type { DeepSeek, SamplingOptions } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { ApiError } from './errors.ts'
import type { FormConstraint, Grammars } from './grammars.ts'
import type { Thinking } from './reasoning.ts'
import { MAX_TEXTS, type SharedFields } from './request-fields.ts'
import type { TemplateTraits } from './template-traits.ts'
import type { Prompt } from './text-parts.ts'
import type { CallReader } from './tool-calls.ts'

/** The model that a server serves. */
export interface ServedModel {
  /** Provides the configuration: context length, vocabulary size and end tokens. The weights are used by the engine. */
  readonly model: Pick<DeepSeek, 'config'>
  /** Encodes prompts and decodes generated tokens. */
  readonly tokenizer: BpeTokenizer
  /** Formats conversations as prompts. Without one, `/v1/chat/completions` and `/v1/responses` return an error. */
  readonly chatTemplate?: ChatTemplate
  /** Name of the model in the API. */
  readonly name: string
}

/** The served model with everything that is derived from it. */
export interface PreparedModel extends ServedModel {
  readonly grammars: Grammars
  readonly traits: TemplateTraits
}

/** The texts to generate for a request. */
export interface GenerationRequest {
  readonly prompts: readonly Prompt[]
  /** Number of texts per prompt. */
  readonly choices: number
  /** The maximum number of tokens to generate after a prompt of this length. */
  readonly maxTokens: (promptLength: number) => number
  readonly sampling: SamplingOptions & { readonly seed: number; readonly stop: readonly string[] }
  readonly stream: boolean
  readonly includeUsage: boolean
  /** Whether the text starts with the prompt. */
  readonly echo: boolean
  /** Number of most likely alternatives to return for each token. Undefined: no log-probabilities. */
  readonly logProbs: number | undefined
  /** One grammar constraint per text, disposed of when the request ends. */
  readonly constraints?: readonly FormConstraint[]
  /** Whether the texts start with reasoning. */
  readonly thinking: Thinking
  /** Extracts tool calls from the texts. */
  readonly calls?: CallReader
  /** Special tokens that mark the reasoning or calls to extract, concatenated. Others are not part of the texts. */
  readonly visibleTokens?: string
  /** Request fields that the response repeats. */
  readonly echoedFields?: object
}

/**
 * Creates the generation request for the common fields of all endpoints.
 * @param field name of the request field that contains the prompts
 * @param defaultMaxTokens default of `max_tokens`; null: up to the end of the context
 * @throws ApiError 400 if fields are invalid together or a prompt does not fit the context, 404 if another model is requested
 */
export function generationRequest(
  served: ServedModel,
  fields: SharedFields,
  prompts: readonly Prompt[],
  field: 'prompt' | 'messages',
  defaultMaxTokens: number | null,
): Omit<GenerationRequest, 'echo' | 'logProbs' | 'constraints' | 'thinking' | 'calls' | 'visibleTokens'> {
  const { model, stream, stream_options: streamOptions, n, stop } = fields
  const logitBias = fields.logit_bias ?? undefined
  if (typeof model === 'string' && model !== served.name) throw unknownModel(model, served.name)
  if (streamOptions && !stream) {
    throw new ApiError(400, 'stream_options requires stream: true', { param: 'stream_options' })
  }
  const choices = n ?? 1
  if (prompts.length * choices > MAX_TEXTS) {
    const problem = `${prompts.length} prompts with n = ${choices} are ${prompts.length * choices} texts`
    throw new ApiError(400, `${problem}, but the limit is ${MAX_TEXTS}: send several requests`, { param: field })
  }
  const { max_position_embeddings: context, vocab_size: vocabulary } = served.model.config
  const unknown = Object.keys(logitBias ?? {}).find(id => Number(id) >= vocabulary)
  if (unknown !== undefined) {
    const message = `logit_bias: token id ${unknown.slice(0, 20)} is out of range, the vocabulary of this model has ${vocabulary} tokens`
    throw new ApiError(400, message, { param: 'logit_bias' })
  }
  const maxTokens = fields.max_tokens ?? defaultMaxTokens ?? Infinity
  for (const {
    ids: { length },
  } of prompts) {
    if (length === 0) throw new ApiError(400, `${field}: the prompt has no tokens`, { param: field })
    if (length + Math.min(maxTokens, 1) <= context) continue
    const room = maxTokens > 0 ? ', including at least one for the answer' : ''
    const problem = `the prompt has ${length} tokens, but the context length of this model is ${context}${room}`
    throw new ApiError(400, `${problem}: shorten the prompt`, { param: field, code: 'context_length_exceeded' })
  }
  return {
    prompts,
    choices,
    maxTokens: length => Math.min(maxTokens, context - length),
    sampling: {
      temperature: fields.temperature ?? 1,
      topK: fields.top_k != null && fields.top_k > 0 ? fields.top_k : undefined,
      // As in OpenAI's API, 0 selects the most likely token.
      topP: Math.max(fields.top_p ?? 1, Number.EPSILON),
      minP: fields.min_p ?? undefined,
      repetitionPenalty: fields.repetition_penalty ?? undefined,
      frequencyPenalty: fields.frequency_penalty ?? undefined,
      presencePenalty: fields.presence_penalty ?? undefined,
      logitBias,
      // Choice i uses seed + i, so the seed must stay small enough for these to be exact.
      seed: (fields.seed ?? Math.floor(Math.random() * 2 ** 32)) % 2 ** 52,
      stop: stop == null ? [] : typeof stop === 'string' ? [stop] : stop,
    },
    stream: stream ?? false,
    includeUsage: streamOptions?.include_usage ?? false,
  }
}

export function unknownModel(model: string, name: string): ApiError {
  const message = `unknown model ${JSON.stringify(model.slice(0, 100))}: this server serves ${JSON.stringify(name)}`
  return new ApiError(404, message, { param: 'model', code: 'model_not_found' })
}
