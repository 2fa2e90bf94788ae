/** @file What is known of a request once it is over: for log lines and metrics. */
import type { FinishReason } from './text-engine.ts'

/** What is known of a request once it is over. */
export interface RequestRecord {
  /** Of HTTP: `POST`. */
  readonly method: string
  /** Without the query: `/v1/chat/completions`. */
  readonly path: string
  /** 499 for a client that went away. */
  status: number
  /** Until the last byte of the answer was handed on. */
  seconds: number
  /** Of all prompts and texts; missing where the request was refused. */
  promptTokens?: number
  /** Tokens made, of all texts; missing where the request was refused. */
  generatedTokens?: number
  /** Of each text that ended. */
  finishReasons?: FinishReason[]
  /** What went wrong in here, or what the client was told. */
  error?: unknown
}
