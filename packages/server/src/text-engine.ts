/** @file What the server needs of whatever makes the texts. */
import type { Generation, TextTurnOptions } from '@moe/deepseek'

/** Makes texts, as many as are asked for at once: `DeepSeek.continuousBatch` does. */
export interface TextEngine {
  /** Continues a sequence of token ids, as `DeepSeek.generate` does. */
  generate(ids: ArrayLike<number>, options: TextTurnOptions): Generation<string>
  /** Texts that are being made, and texts that are yet to begin. */
  readonly running: number
  /** Texts that are yet to begin. */
  readonly waiting: number
}

/** Why a text ended: at an end token or a stop, or at its most tokens; or, of those that ended, that it calls tools. */
export type FinishReason = 'stop' | 'length' | 'tool_calls'
