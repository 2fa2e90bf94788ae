/** @file From the fields of a request to what the engine is asked. */
import type { DeepSeek, SamplingOptions } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { ApiError } from './errors.ts'
import type { FormConstraint, Grammars } from './grammars.ts'
import type { Thinking } from './reasoning.ts'
import { MOST_TEXTS, type SharedFields } from './request-fields.ts'
import type { TemplateTraits } from './template-traits.ts'
import type { CallReader } from './tool-calls.ts'

/** What is served. */
export interface Served {
  /** Tells the context and the tokens that end a text; the engine has the weights. */
  readonly model: Pick<DeepSeek, 'config'>
  /** Makes tokens of prompts and text of tokens. */
  readonly tokenizer: BpeTokenizer
  /** Writes conversations. Default: none, and chat completions are refused. */
  readonly chatTemplate?: ChatTemplate
  /** Name of the model for clients. */
  readonly name: string
}

/** What is served, and what belongs to it. */
export interface Opened extends Served {
  readonly grammars: Grammars
  readonly traits: TemplateTraits
}

export interface Prompt {
  readonly ids: ArrayLike<number>
  /** How many in front are none of the request's: the tokenizer puts them there. */
  readonly added: number
}

/** The texts that a request asks for. */
export interface WantedTexts {
  readonly prompts: readonly Prompt[]
  /** Texts for each prompt. */
  readonly choices: number
  /** Most tokens of a text behind a prompt of this length. */
  readonly maxTokens: (promptLength: number) => number
  readonly sampling: SamplingOptions & { readonly seed: number; readonly stop: readonly string[] }
  readonly stream: boolean
  readonly includeUsage: boolean
  /** Whether the prompt stands in front of the text. */
  readonly echo: boolean
  /** How many of the likeliest tokens are told beside each. Undefined: nothing is. */
  readonly logProbs: number | undefined
  /** What each is held to, which ends with the texts. */
  readonly constraints?: readonly FormConstraint[]
  /** What they begin with. */
  readonly thinking: Thinking
  /** Reads calls of tools out of them. */
  readonly calls?: CallReader
  /** What the answer repeats of the request. */
  readonly about?: object
}

/**
 * @param field that the prompts come from
 * @param mostTokens default number of tokens; null: as many as the context has room for
 * @throws ApiError 400 for what does not go together, 404 for another model
 */
export function wantedTexts(
  served: Served,
  fields: SharedFields,
  prompts: readonly Prompt[],
  field: 'prompt' | 'messages',
  mostTokens: number | null,
): Omit<WantedTexts, 'echo' | 'logProbs' | 'constraints' | 'thinking' | 'calls'> {
  const { model, stream, stream_options: streamOptions, n, stop } = fields
  if (typeof model === 'string' && model !== served.name) throw unknownModel(model, served.name)
  if (streamOptions && !stream) {
    throw new ApiError(400, 'stream_options goes with stream: true', { param: 'stream_options' })
  }
  const choices = n ?? 1
  if (prompts.length * choices > MOST_TEXTS) {
    const problem = `${prompts.length} prompts with ${choices} choices are ${prompts.length * choices} texts`
    throw new ApiError(400, `${problem}, the most at once is ${MOST_TEXTS}: send several requests`, { param: field })
  }
  const { max_position_embeddings: context } = served.model.config
  const wanted = fields.max_tokens ?? mostTokens ?? Infinity
  for (const {
    ids: { length },
  } of prompts) {
    if (length === 0) throw new ApiError(400, `${field}: there are no tokens in it`, { param: field })
    if (length + Math.min(wanted, 1) <= context) continue
    const room = wanted > 0 ? ', of which one is for the answer' : ''
    const problem = `the prompt has ${length} tokens, and this model's context ${context}${room}`
    throw new ApiError(400, `${problem}: shorten it`, { param: field, code: 'context_length_exceeded' })
  }
  return {
    prompts,
    choices,
    maxTokens: length => Math.min(wanted, context - length),
    sampling: {
      temperature: fields.temperature ?? 1,
      topK: fields.top_k != null && fields.top_k > 0 ? fields.top_k : undefined,
      // 0 leaves the likeliest token, as at OpenAI.
      topP: Math.max(fields.top_p ?? 1, Number.EPSILON),
      minP: fields.min_p ?? undefined,
      repetitionPenalty: fields.repetition_penalty ?? undefined,
      // Choices have the seeds that follow, which must be others.
      seed: (fields.seed ?? Math.floor(Math.random() * 2 ** 32)) % 2 ** 52,
      stop: stop == null ? [] : typeof stop === 'string' ? [stop] : stop,
    },
    stream: stream ?? false,
    includeUsage: streamOptions?.include_usage ?? false,
  }
}

export function unknownModel(model: string, name: string): ApiError {
  const message = `there is no model ${JSON.stringify(model.slice(0, 100))}: this server has ${JSON.stringify(name)}`
  return new ApiError(404, message, { param: 'model', code: 'model_not_found' })
}
