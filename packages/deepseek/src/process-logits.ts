/** @file Sampling options that apply to the logits on the host: logit bias, penalties and constraints. */
import { MoeError } from '@moe/core'
import { type AllowedTokens, isDrawn, needsLogits, notNumbers, type SamplingOptions, type Scores } from './sampling.ts'

/** The largest finite f32. */
const largest = (2 - 2 ** -23) * 2 ** 127

/** The tokens that occur in a text, for penalties, and its logit bias. */
export class Occurrences {
  /** Tokens of the prompt and the generated text. */
  readonly #all: Set<number>
  /** How often each token was generated. */
  readonly #generated = new Map<number, number>()
  /** Tokens with a bias and their biases. Reading them from the object for each token would be slow. */
  readonly #biased: Uint32Array
  readonly #biases: Float64Array

  readonly #options: SamplingOptions

  constructor(prompt: Iterable<number>, options: SamplingOptions) {
    const { logitBias = {} } = options
    this.#options = options
    this.#all = new Set(prompt)
    this.#biased = Uint32Array.from(Object.keys(logitBias), Number)
    this.#biases = Float64Array.from(Object.values(logitBias))
  }

  /** Counts a generated token. */
  add(token: number): void {
    this.#all.add(token)
    this.#generated.set(token, (this.#generated.get(token) ?? 0) + 1)
  }

  /** Applies the logit bias and the penalties to logits, in place, in the order of vLLM. */
  apply(logits: Float32Array): void {
    const { repetitionPenalty = 1, frequencyPenalty = 0, presencePenalty = 0 } = this.#options
    for (let i = 0; i < this.#biased.length; i++) logits[this.#biased[i]] += this.#biases[i]
    if (repetitionPenalty !== 1) {
      for (const token of this.#all) {
        const logit = logits[token]
        const penalized = logit < 0 ? logit * repetitionPenalty : logit / repetitionPenalty
        // Infinite logits would have NaN as their difference.
        logits[token] = Number.isFinite(logit) ? Math.max(-largest, Math.min(largest, penalized)) : penalized
      }
    }
    if (frequencyPenalty === 0 && presencePenalty === 0) return
    for (const [token, count] of this.#generated) logits[token] -= count * frequencyPenalty + presencePenalty
  }
}

/**
 * Applies the logit bias and the penalties to logits, in place, removes tokens that are not `allowed`, and returns scores. Scores that need no logits are returned unchanged.
 * @throws MoeError E_ATTR if no token is allowed, E_NAN
 */
export function processLogits(
  scores: Scores,
  occurrences: Occurrences,
  options: SamplingOptions,
  allowed: AllowedTokens = null,
): Scores {
  const { temperature = 0 } = options
  if (typeof scores === 'number' || !needsLogits(options)) return scores
  occurrences.apply(scores)
  if (allowed) mask(scores, allowed)
  const { length } = scores
  let best = 0
  while (scores[best] === -Infinity) best++
  if (best === length) {
    const problem = 'the constraint allows no token'
    const fix = 'allow at least one token: at the end of the text, an end token'
    throw new MoeError({ code: 'E_ATTR', op: 'generate', problem, fix })
  }
  for (let i = best + 1; i < length; i++) if (scores[i] > scores[best]) best = i
  if (Number.isNaN(scores[best])) throw notNumbers()
  if (!isDrawn(options)) return best
  const largest = scores[best]
  for (let i = 0; i < length; i++) scores[i] = Math.exp((scores[i] - largest) / temperature)
  return scores
}

function mask(logits: Float32Array, allowed: Int32Array | Uint32Array): void {
  const { length } = logits
  for (let start = 0; start < length; start += 32) {
    // Reading beyond the last word gives undefined, which counts as 0.
    const word = allowed[start >> 5]
    if (~word === 0) continue
    const end = Math.min(length, start + 32)
    for (let i = start; i < end; i++) if (((word >>> (i & 31)) & 1) === 0) logits[i] = -Infinity
  }
}
