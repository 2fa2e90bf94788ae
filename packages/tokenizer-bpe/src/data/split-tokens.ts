/**
 * @file Randomly splits tokens that merge punctuation and newlines. DeepSeek-V3's vocabulary has such tokens, and a
 * prompt that ends between the two would otherwise contain a token that the model has never seen there. In its training
 * data, a part of these tokens is split (report, section 4.1), so that the model learns both forms.
 */

import { TokenizerError } from '../errors.ts'
import type { BpeTokenizer } from '../tokenizer.ts'
import { type CallRules, randomRule, validateCall } from '../validate-call.ts'

/** Options of `MergedTokenSplitter`. */
export interface SplitTokensOptions {
  /** Fraction of the eligible tokens to split. */
  readonly rate: number
  /** Returns numbers in [0, 1); use `randomNumbers(seed)` for a reproducible source. */
  readonly random: () => number
}

const rules: CallRules<SplitTokensOptions> = { options: { rate: true, random: randomRule } }

/** Splits tokens that merge punctuation and newlines. Create one per tokenizer, since it scans the whole vocabulary. */
export class MergedTokenSplitter {
  /** For each eligible token, the index of its parts in `#parts`; otherwise 0. */
  readonly #partsOf: Int32Array
  /** For each eligible token: the number of its parts' tokens, and these tokens. */
  readonly #parts: number[] = [0]
  readonly #options: SplitTokensOptions

  /** @throws TokenizerError E_CONFIG for a rate outside 0..1 */
  constructor(tokenizer: BpeTokenizer, options: SplitTokensOptions) {
    validateCall('MergedTokenSplitter', rules, options)
    if (!(options.rate >= 0 && options.rate <= 1)) {
      throw new TokenizerError({
        code: 'E_CONFIG',
        op: 'MergedTokenSplitter',
        problem: `rate ${options.rate} is not from 0 to 1`,
      })
    }
    this.#options = options
    this.#partsOf = new Int32Array(tokenizer.vocabSize)
    const added = new Set(tokenizer.addedTokens.map(token => token.id))
    const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
    for (let id = 0; id < tokenizer.vocabSize; id++) {
      if (added.has(id) || tokenizer.idToToken(id) === undefined) continue
      let text: string
      try {
        text = decoder.decode(tokenizer.tokenBytes(id))
      } catch {
        continue
      }
      // Punctuation, with what may precede it, then newlines.
      const match = /^( ?[\p{P}\p{S}]+)([\r\n]+)$/u.exec(text)
      if (match === null) continue
      const parts = [match[1], match[2]].map(part => [...tokenizer.encode(part, { addSpecialTokens: false })])
      this.#partsOf[id] = this.#parts.length
      this.#parts.push(parts[0].length + parts[1].length, ...parts[0], ...parts[1])
    }
  }

  /** Number of tokens of the vocabulary that can be split. */
  get eligible(): number {
    return this.#partsOf.reduce((sum, index) => sum + (index > 0 ? 1 : 0), 0)
  }

  /** Returns ids with a random part of the eligible tokens split in two. The text stays the same. */
  split(ids: Iterable<number>): Uint32Array {
    const { rate, random } = this.#options
    const out: number[] = []
    for (const id of ids) {
      const index = this.#partsOf[id]
      if (index > 0 && random() < rate) out.push(...this.#parts.slice(index + 1, index + 1 + this.#parts[index]))
      else out.push(id)
    }
    return Uint32Array.from(out)
  }
}
