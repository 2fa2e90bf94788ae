/** @file The interface of endpoints that generate text. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ApiError } from './errors.ts'
import type { GenerationRequest, PreparedModel } from './generation-request.ts'
import type { FinishReason } from './text-engine.ts'
import type { ScoredToken } from './text-parts.ts'
import type { ToolCall } from './tool-format.ts'

/** A part of a generated text, or all of it. */
export interface GeneratedPart {
  readonly text: string
  /** Reasoning before the text; empty if there is none. */
  readonly reasoning: string
  readonly calls: readonly ToolCall[]
  /** Log-probabilities in the format of the endpoint; null if not requested. */
  readonly logProbs: object | null
}

/** Token counts of a request. */
export interface Usage {
  /** Tokens of all prompts. */
  readonly prompt: number
  /** Prompt tokens that were already in the cache. */
  readonly cachedTokens: number
  readonly generated: number
  /** Generated tokens up to the end of the reasoning, summed over all texts. */
  readonly reasoning: number
}

/** Fields at the start of every response. */
export interface Head {
  readonly id: string
  /** Unix time in seconds. */
  readonly created: number
  /** Name of the model. */
  readonly model: string
}

/** A server-sent event. */
export interface StreamEvent {
  readonly event?: string
  readonly data: string
}

/** The events of a streamed response. Texts are identified by their index. */
export interface Stream {
  begin(): readonly StreamEvent[]
  /** Before the first part of a text. */
  opening(index: number): readonly StreamEvent[]
  part(index: number, part: GeneratedPart): readonly StreamEvent[]
  /** After the last part of a text. */
  end(index: number, finish: FinishReason): readonly StreamEvent[]
  /** After all texts. */
  over(usage: Usage): readonly StreamEvent[]
  /** Replaces all remaining events after an error. */
  failed(error: ApiError): readonly StreamEvent[]
  /** After all other events, including an error. */
  readonly last: readonly StreamEvent[]
}

export interface Endpoint {
  /** Prefix of response ids. */
  readonly prefix: string
  /**
   * Validates the body of a request.
   * @param signal aborts when the client disconnects
   * @throws ApiError if the request is invalid or unsupported
   */
  parse(body: unknown, served: PreparedModel, signal: AbortSignal): Promise<GenerationRequest>
  /** The body of a response that is not streamed. */
  body(
    head: Head,
    texts: ReadonlyArray<GeneratedPart & { readonly finish: FinishReason }>,
    usage: Usage,
    request: GenerationRequest,
  ): object
  stream(head: Head, request: GenerationRequest): Stream
  /** Formats log-probabilities. */
  logProbs(tokens: readonly ScoredToken[], tokenizer: BpeTokenizer): object
}
