/** @file The record of a finished request, for logs and metrics. */
import type { FinishReason } from './text-engine.ts'

/** A finished request, as passed to `onRequest` of {@link ServerOptions}. */
export interface RequestRecord {
  /** HTTP method, for example `POST`. */
  readonly method: string
  /** Path without the query, for example `/v1/chat/completions`. */
  readonly path: string
  /** HTTP status; 499 if the client disconnected. If a stream fails, the status of its error. */
  status: number
  /** Seconds from the start of the request until the response was complete. */
  seconds: number
  /** Number of tokens of all prompts; undefined if the request was rejected. */
  promptTokens?: number
  /** Number of generated tokens of all texts; undefined if the request was rejected. */
  generatedTokens?: number
  /** Why each finished text ended. */
  finishReasons?: FinishReason[]
  /** The error, if the request was rejected or failed. */
  error?: unknown
}
