/** @file The interface between the server and a text generator. */
import type { Generation, TextTurnOptions } from '@moe/deepseek'

/** Generates texts, several at the same time. `DeepSeek.continuousBatch` returns one. */
export interface TextEngine {
  /** Generates text that continues a sequence of token ids, like `DeepSeek.generate`. */
  generate(ids: ArrayLike<number>, options: TextTurnOptions): Generation<string>
  /** The number of texts that are being generated. */
  readonly running: number
  /** The number of texts that wait to be started. */
  readonly waiting: number
}

/**
 * Why a text ended: `stop` at an end token or stop string, `length` at the token limit, `tool_calls` if it ended like `stop` and contains tool calls.
 */
export type FinishReason = 'stop' | 'length' | 'tool_calls'
