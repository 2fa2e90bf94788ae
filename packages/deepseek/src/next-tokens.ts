/** @file Chooses the next tokens of a text: accepts drafts or samples. */
import type { Random } from '@moe/core'
import { type Occurrences, processLogits } from './process-logits.ts'
import { draw, restrict, type SamplingOptions, type Scores, sample } from './sampling.ts'

/** State of a text that a token choice depends on. */
interface Following {
  readonly options: SamplingOptions
  readonly random: Random
  readonly occurrences: Occurrences
  /** Tokens that end the text. */
  readonly ends: ReadonlySet<number | string>
  /** Counts of drafted and accepted tokens, by depth. */
  readonly stats: { readonly drafted: number[]; readonly accepted: number[] }
}

/** Returns the next tokens of a text: the drafts that are accepted by `scores`, which contains one entry per draft and one more, and one further token. */
export async function nextTokens(
  scores: readonly Scores[],
  drafts: readonly number[],
  text: Following,
): Promise<number[]> {
  const { options, random, occurrences, ends, stats } = text
  const made: number[] = []
  for (const [i, each] of scores.entries()) {
    const allowed = await options.constraint?.allowed()
    const processed = processLogits(each, occurrences, options, allowed)
    const last = i === drafts.length
    const { token, accepted } = last
      ? { token: sample(processed, options, random), accepted: false }
      : verifyDraft(processed, drafts[i], options, random)
    made.push(token)
    occurrences.add(token)
    options.constraint?.accept(token)
    if (!last) stats.drafted[i]++
    if (accepted) stats.accepted[i]++
    if (!accepted || ends.has(token)) break
  }
  return made
}

/** Returns whether a drafted token is accepted, and the token to use. */
export function verifyDraft(
  scores: Scores,
  draft: number,
  options: SamplingOptions,
  random: Random,
): { token: number; accepted: boolean } {
  if (typeof scores !== 'number') return acceptOrDraw(restrict(scores, options), draft, random)
  return { token: scores, accepted: scores === draft }
}

/**
 * Accepts a drafted token with its own probability, else samples from the others, so that the result has exactly the distribution `p`
 * (speculative sampling with a deterministic draft; Leviathan et al. 2023).
 */
function acceptOrDraw(p: Float32Array, draft: number, random: Random): { token: number; accepted: boolean } {
  const { length } = p
  let total = 0
  for (let i = 0; i < length; i++) total += p[i]
  if (p[draft] > 0 && random.next() * total < p[draft]) return { token: draft, accepted: true }
  const rest = p.slice()
  rest[draft] = 0
  return { token: draw(rest, random), accepted: false }
}
