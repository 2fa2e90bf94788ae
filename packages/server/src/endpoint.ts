/** @file What the endpoints that make texts differ in. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import type { ApiError } from './errors.ts'
import type { FinishReason } from './text-engine.ts'
import type { ToldToken } from './text-parts.ts'
import type { ToolCall } from './tool-calls.ts'
import type { Opened, WantedTexts } from './wanted-texts.ts'

/** What is made, whole or a part of it. */
export interface Made {
  readonly text: string
  /** What was thought before it; empty where there is none. */
  readonly reasoning: string
  readonly calls: readonly ToolCall[]
  /** As `logProbs` writes them; null where nobody asked. */
  readonly logProbs: object | null
}

/** Tokens of a request. */
export interface Usage {
  /** Of all prompts, and how many of these had been read before. */
  readonly prompt: number
  readonly reused: number
  readonly made: number
}

/** Of an answer. */
export interface Head {
  readonly id: string
  /** Seconds since 1970. */
  readonly created: number
  /** Name of the model. */
  readonly model: string
}

/** Of a stream: data, and what it is called where it has a name. */
export interface StreamEvent {
  readonly event?: string
  readonly data: string
}

/** An answer in parts. Texts are known by their numbers. */
export interface Stream {
  begin(): readonly StreamEvent[]
  /** Before any part of a text; a part of it; behind the last one. */
  opening(index: number): readonly StreamEvent[]
  part(index: number, made: Made): readonly StreamEvent[]
  end(index: number, finish: FinishReason): readonly StreamEvent[]
  /** Behind all texts. */
  over(usage: Usage): readonly StreamEvent[]
  /** In place of the rest. */
  failed(error: ApiError): readonly StreamEvent[]
  /** Behind everything, also what failed. */
  readonly last: readonly StreamEvent[]
}

export interface Endpoint {
  /** Of the answer's id. */
  readonly prefix: string
  /**
   * @param signal of the request
   * @throws ApiError for what cannot be
   */
  wanted(body: unknown, served: Opened, signal: AbortSignal): Promise<WantedTexts>
  /** An answer as a whole. */
  body(
    head: Head,
    texts: ReadonlyArray<Made & { readonly finish: FinishReason }>,
    usage: Usage,
    wanted: WantedTexts,
  ): object
  stream(head: Head, wanted: WantedTexts): Stream
  /** What is told of tokens. */
  logProbs(tokens: readonly ToldToken[], tokenizer: BpeTokenizer): object
}
