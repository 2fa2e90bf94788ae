/** @file From texts to tokens, where lm-evaluation-harness cuts them (`_encode_pair`, `_loglikelihood_tokens`, `get_rolling_token_windows` there). */
import { MoeError } from '@moe/core'
import { dataError } from './fields.ts'

/** What is needed of a tokenizer. That of `@moe/tokenizer-bpe` is one. */
export interface EvaluationTokenizer {
  /** Ids of a text. With `addSpecialTokens: false` nothing stands in preamble of it. */
  encode(text: string, options?: { addSpecialTokens?: boolean }): ArrayLike<number>
  /** For answers that are written: makes text of ids, with `skipSpecialTokens` without special tokens. */
  createDecodeStream(options?: { skipSpecialTokens?: boolean }): { push(id: number): string; end(): string }
  /** Number of ids. */
  readonly vocabSize?: number
}

/** A text, and from which token on the model is asked how likely it is. */
export interface Scored {
  readonly ids: readonly number[]
  readonly from: number
  /** Whether tokens are missing on the left. */
  readonly cut: boolean
}

/** What decides which tokens a text has. */
export interface EncoderOptions {
  readonly tokenizer: EvaluationTokenizer
  /** Tokens that the model reads at most. */
  readonly context: number
  readonly begin: number | null | undefined
  readonly prefix: number | undefined
}

/** Makes tokens of texts for one model. */
export class TextEncoder {
  readonly #options: EncoderOptions

  constructor(options: EncoderOptions) {
    this.#options = options
  }

  /** Ids of a text with what stands in preamble of it. */
  encode(text: string): number[] {
    const { tokenizer, begin } = this.#options
    if (begin === undefined) return Array.from(tokenizer.encode(text))
    const ids = this.#plain(text)
    // Texts may have it written out.
    return begin === null || ids[0] === begin ? ids : [begin, ...ids]
  }

  #plain(text: string): number[] {
    return Array.from(this.#options.tokenizer.encode(text, { addSpecialTokens: false }))
  }

  /**
   * Context and continuation encoded as one text, whose tokens behind as many as the context alone has are the continuation's. White space at the context's end goes to the
   * continuation. @throws MoeError E_DATA where that has no tokens, or more than the model reads
   */
  pair(context: string, continuation: string, place: string): Scored {
    const kept = context.trimEnd()
    if (context === '') return this.#scored(this.#behindNothing(this.#plain(continuation)), place, continuation)
    const ids = this.encode(context + continuation)
    // White space alone is encoded as nothing, where no token begins a text.
    const from = this.encode(kept).length
    if (from === 0) return this.#scored(this.#behindNothing(ids), place, continuation)
    return this.#scored({ ids, from }, place, continuation)
  }

  /** A continuation that nothing stands before. Where it begins with the prefix itself, that is what stands before. */
  #behindNothing(ids: readonly number[]): { ids: readonly number[]; from: number } {
    const prefix = this.#prefix
    return { ids: ids[0] === prefix ? ids : [prefix, ...ids], from: 1 }
  }

  get #prefix(): number {
    const { begin, prefix } = this.#options
    const own = begin === undefined ? this.encode('')[0] : begin
    const found = own ?? prefix
    if (found !== undefined) return found
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'evaluateTask',
      problem: 'nothing stands before the first token of a text, so nothing is known of it',
      fix: 'pass prefix: the id of a token that begins or ends texts',
    })
  }

  #scored({ ids, from }: { ids: readonly number[]; from: number }, place: string, continuation: string): Scored {
    const { context } = this.#options
    const count = ids.length - from
    if (count < 1) throw dataError(place, `${JSON.stringify(continuation)} has no tokens behind its context`)
    if (count > context) {
      throw dataError(place, `an answer has ${count} tokens, and the context of the model ${context}`)
    }
    // The last token is not read.
    const over = Math.max(0, ids.length - context - 1)
    return over === 0 ? { ids, from, cut: false } : { ids: ids.slice(over), from: from - over, cut: true }
  }

  /** A prompt with room for `maxTokens` behind it. @throws MoeError E_CONFIG where there is none */
  prompt(text: string, maxTokens: number): { readonly ids: readonly number[]; readonly cut: boolean } {
    const { context } = this.#options
    const room = context - maxTokens
    if (room < 1) {
      const problem = `answers of ${maxTokens} tokens leave no room for a prompt in a context of ${context}`
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'evaluateTask',
        problem,
        fix: 'pass a smaller maxTokens with the task',
      })
    }
    const ids = this.encode(text)
    const all = ids.length === 0 ? [this.#prefix] : ids
    return { ids: all.slice(-room), cut: all.length > room }
  }

  /** A whole text in pieces as long as the context, each of whose tokens is predicted once: the first behind the prefix, each other piece behind the last token before it. */
  windows(text: string): Scored[] {
    const { context } = this.#options
    const ids = this.#plain(text)
    const all = ids[0] === this.#prefix ? ids : [this.#prefix, ...ids]
    const result: Scored[] = []
    for (let start = 0; start + 1 < all.length; start += context) {
      // The last piece has as much in preamble of it as there is room for.
      const end = Math.min(all.length, start + context + 1)
      const first = Math.max(0, end - context - 1)
      result.push({ ids: all.slice(first, end), from: start + 1 - first, cut: false })
    }
    return result
  }
}
