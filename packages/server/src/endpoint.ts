/** @file What the endpoints that make texts differ in. */
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
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

export interface Endpoint {
  /** Of the response's id. */
  readonly prefix: string
  readonly object: string
  readonly chunkObject: string
  /**
   * @param signal of the request
   * @throws ApiError for what cannot be
   */
  wanted(body: unknown, served: Opened, signal: AbortSignal): WantedTexts | Promise<WantedTexts>
  /** One of `choices`, whole. */
  choice(index: number, made: Made, finish: FinishReason): object
  /** The same in a stream: before any text; a part of it; at its end. */
  opening(index: number): object | undefined
  part(index: number, made: Made): object
  end(index: number, finish: FinishReason): object
  /** What is told of tokens. */
  logProbs(tokens: readonly ToldToken[], tokenizer: BpeTokenizer): object
}
