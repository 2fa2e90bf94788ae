/** @file Encodes texts and splits them into tokens exactly as lm-evaluation-harness does (`_encode_pair`, `_loglikelihood_tokens`, `get_rolling_token_windows`). */
import { MoeError } from '@moe/core'
import { dataError } from './fields.ts'

/** A tokenizer, such as `BpeTokenizer` of `@moe/tokenizer-bpe`. */
export interface EvaluationTokenizer {
  /** Encodes a text. With `addSpecialTokens: false`, adds no tokens at the start. */
  encode(text: string, options?: { addSpecialTokens?: boolean }): ArrayLike<number>
  /** Creates an incremental decoder, for generated answers. `skipSpecialTokens` leaves out special tokens. */
  createDecodeStream(options?: { skipSpecialTokens?: boolean }): { push(id: number): string; end(): string }
  /** The number of ids. */
  readonly vocabSize?: number
}

/** An encoded text. The model scores its tokens from number `from` on. */
export interface Scored {
  readonly ids: readonly number[]
  readonly from: number
  /** Whether tokens were truncated on the left. */
  readonly truncated: boolean
}

export interface EncoderOptions {
  readonly tokenizer: EvaluationTokenizer
  /** The model's context length in tokens. */
  readonly context: number
  readonly bos: number | null | undefined
  readonly prefix: number | undefined
}

/** Encodes texts for one model. */
export class TextEncoder {
  readonly #options: EncoderOptions

  constructor(options: EncoderOptions) {
    this.#options = options
  }

  /** The ids of a text, including the token at its start. */
  encode(text: string): number[] {
    const { tokenizer, bos } = this.#options
    if (bos === undefined) return Array.from(tokenizer.encode(text))
    const ids = this.#plain(text)
    // The text itself may start with the token.
    return bos === null || ids[0] === bos ? ids : [bos, ...ids]
  }

  #plain(text: string): number[] {
    return Array.from(this.#options.tokenizer.encode(text, { addSpecialTokens: false }))
  }

  /**
   * Encodes context and continuation as one text. The continuation's tokens are those after as many as the context alone has. White space at the end of the context belongs to the
   * continuation.
   * @throws MoeError E_DATA if the continuation has no tokens, or more than fit in the context
   */
  pair(context: string, continuation: string, location: string): Scored {
    const kept = context.trimEnd()
    if (context === '') return this.#scored(this.#afterPrefix(this.#plain(continuation)), location, continuation)
    const ids = this.encode(context + continuation)
    // A context of white space has no tokens if no token is added at the start.
    const from = this.encode(kept).length
    if (from === 0) return this.#scored(this.#afterPrefix(ids), location, continuation)
    return this.#scored({ ids, from }, location, continuation)
  }

  /** A continuation without context, after the prefix token. If it starts with that token itself, none is added. */
  #afterPrefix(ids: readonly number[]): { ids: readonly number[]; from: number } {
    const prefix = this.#prefix
    return { ids: ids[0] === prefix ? ids : [prefix, ...ids], from: 1 }
  }

  get #prefix(): number {
    const { bos, prefix } = this.#options
    const own = bos === undefined ? this.encode('')[0] : bos
    const found = own ?? prefix
    if (found !== undefined) return found
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'evaluateTask',
      problem: 'no token precedes the first token of a text, so its probability is undefined',
      fix: 'pass prefix, the id of a token that starts or ends texts',
    })
  }

  #scored({ ids, from }: { ids: readonly number[]; from: number }, location: string, continuation: string): Scored {
    const { context } = this.#options
    const count = ids.length - from
    if (count < 1) throw dataError(location, `${JSON.stringify(continuation)} adds no tokens to its context`)
    if (count > context) {
      throw dataError(location, `an answer has ${count} tokens, but the model's context length is ${context}`)
    }
    // The last token is only predicted, not read.
    const over = Math.max(0, ids.length - context - 1)
    return over === 0 ? { ids, from, truncated: false } : { ids: ids.slice(over), from: from - over, truncated: true }
  }

  /** Encodes a prompt, truncated on the left to leave room for `maxTokens`. @throws MoeError E_CONFIG if there is no room for a prompt */
  prompt(text: string, maxTokens: number): { readonly ids: readonly number[]; readonly truncated: boolean } {
    const { context } = this.#options
    const room = context - maxTokens
    if (room < 1) {
      const problem = `answers of ${maxTokens} tokens leave no room for a prompt in a context of ${context}`
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'evaluateTask',
        problem,
        fix: 'set a smaller maxTokens in the task',
      })
    }
    const ids = this.encode(text)
    const all = ids.length === 0 ? [this.#prefix] : ids
    return { ids: all.slice(-room), truncated: all.length > room }
  }

  /** Splits a text into windows of the context length that predict each token once. The first window starts with the prefix token, the others with the last token of the window before. */
  windows(text: string): Scored[] {
    const { context } = this.#options
    const ids = this.#plain(text)
    const all = ids[0] === this.#prefix ? ids : [this.#prefix, ...ids]
    const result: Scored[] = []
    for (let start = 0; start + 1 < all.length; start += context) {
      // The last window is extended to the left to the full context.
      const end = Math.min(all.length, start + context + 1)
      const first = Math.max(0, end - context - 1)
      result.push({ ids: all.slice(first, end), from: start + 1 - first, truncated: false })
    }
    return result
  }
}
