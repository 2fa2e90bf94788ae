/** @file From logits to a token: to probabilities on the device, and to one of them here. */
import { MoeError, type Random, shown, softmax, type Tensor } from '@moe/core'

/** A bit for each token. */
export type AllowedTokens = Int32Array | Uint32Array | null

/** Says which tokens may come next in a text: that of a grammar, say. One object is of one text. */
export interface TokenConstraint {
  /**
   * The tokens that may come next, asked before each: bit `id % 32` of word `id / 32` is 1 for one that may, and ids behind the last word may not. Null: all may. The
   * words are read at once; the pass waits for a promise. A text for which none may fails with E_ATTR.
   */
  allowed(): AllowedTokens | Promise<AllowedTokens>
  /** The text goes on with this token, or ends with it. */
  accept(token: number): void
}

/**
 * How a token is chosen: logits are penalized, those of tokens that may not come left out, divided by the temperature, and of their probabilities `topK`, then
 * `topP`, then `minP` leave some.
 */
export interface SamplingOptions {
  /** 0 takes the likeliest token, always the same; 1 draws as the model says. Default 0. */
  readonly temperature?: number
  /** Only so many tokens, the likeliest. */
  readonly topK?: number
  /** Of these the smallest set whose share of their probability reaches this. */
  readonly topP?: number
  /** Only tokens at least this share of the likeliest one's probability. */
  readonly minP?: number
  /**
   * By this the logits of all tokens that stand before, in the prompt or behind it, are divided, or multiplied where they are negative: above 1 a text repeats
   * itself less, also at temperature 0 (Keskar et al. 2019, "CTRL"). 1.2 is usual. Default 1.
   */
  readonly repetitionPenalty?: number
  /** Which tokens may come next. Default: all. */
  readonly constraint?: TokenConstraint
}

/** How what follows is scored. */
export interface Scoring extends SamplingOptions {
  /** Tokens with ids from here on are not made. */
  readonly vocabulary: number
}

/** What follows a token: the probabilities of all, or, where nothing is drawn, the likeliest. */
export type Scores = Float32Array | number

/** Temperatures below this are 0: their reciprocal is about to leave f32. */
const coldest = 1e-30

/** Whether a token is drawn, and not the likeliest one taken. */
export const isDrawn = ({ temperature = 0 }: SamplingOptions): boolean => temperature >= coldest

/** Whether `penalize` is still to come. */
export const needsLogits = ({ repetitionPenalty = 1, constraint }: SamplingOptions): boolean =>
  repetitionPenalty !== 1 || constraint !== undefined

/**
 * Where the logits `[..., V]` are: probabilities at that temperature, or the likeliest tokens `i32 [..., 1]`, the lowest of equals, at 0. The logits themselves
 * where `penalize` is still to come.
 */
export function scoresOf(all: Tensor, options: Partial<Scoring> = {}): Tensor {
  const { temperature = 0, vocabulary } = options
  const logits = vocabulary === undefined ? all : upTo(all, vocabulary)
  if (needsLogits(options)) return logits
  return isDrawn(options) ? probabilitiesOf(logits, 1 / temperature) : logits.topk(1).indices
}

/** Of logits `[..., V]` those of tokens that may be made, `[..., vocabulary]`. */
export const upTo = (logits: Tensor, vocabulary: number): Tensor =>
  vocabulary < (logits.shape.at(-1) as number) ? logits.narrow(-1, 0, vocabulary) : logits

/** Of logits `[..., V]` at the reciprocal of a temperature, one for all or of each row. */
export function probabilitiesOf(logits: Tensor, coldness: Tensor | number): Tensor {
  return softmax(logits.sub(logits.max(-1, true)).mul(coldness))
}

/** @throws MoeError E_ATTR for a value outside its range. */
export function checkSampling(options: SamplingOptions & { readonly seed?: number }): void {
  const { temperature = 0, topK = 1, topP = 1, minP = 0, repetitionPenalty = 1, constraint } = options
  const problems: string[] = []
  const idle = (['topK', 'topP', 'minP', 'seed'] as const).filter(name => options[name] !== undefined)
  if (options.temperature === undefined && idle.length > 0) {
    problems.push(`${idle.join(', ')} would do nothing, as nothing is drawn without a temperature: pass temperature: 1`)
  }
  if (!atLeast0(temperature)) problems.push(`temperature = ${shown(temperature)} is no number from 0`)
  if (!(Number.isInteger(topK) && topK > 0))
    problems.push(`topK = ${shown(topK)} is no number of tokens, which is 1 or more`)
  if (!(atLeast0(topP) && topP > 0 && topP <= 1)) problems.push(`topP = ${shown(topP)} is not in (0, 1]`)
  if (!(atLeast0(minP) && minP <= 1)) problems.push(`minP = ${shown(minP)} is not in [0, 1]`)
  if (!(Number.isFinite(repetitionPenalty) && repetitionPenalty > 0)) {
    problems.push(`repetitionPenalty = ${shown(repetitionPenalty)} is not above 0`)
  }
  if (constraint !== undefined && !(isFunction(constraint?.allowed) && isFunction(constraint.accept))) {
    problems.push('constraint has no functions allowed and accept')
  }
  if (problems.length > 0) throw new MoeError({ code: 'E_ATTR', op: 'generate', problem: problems.join('; ') })
}

/** Not a string that JavaScript would take for a number, nor NaN. */
export const atLeast0 = (value: unknown): value is number => typeof value === 'number' && value >= 0

const isFunction = (value: unknown): boolean => typeof value === 'function'

/** The next token. Probabilities that are left out become 0. */
export function sample(scores: Scores, options: SamplingOptions, random: Random): number {
  return typeof scores === 'number' ? scores : draw(restrict(scores, options), random)
}

/** What becomes of a text's tokens. */
interface Following {
  readonly options: SamplingOptions
  readonly random: Random
  /** Tokens that stand before, for penalties. */
  readonly known: Set<number>
  /** Tokens that end it. */
  readonly ends: ReadonlySet<number | string>
  /** Counts of drafts by depth. */
  readonly stats: { readonly drafted: number[]; readonly accepted: number[] }
}

/** The tokens that stand by what follows each of a pass, `scores`: of the drafts as many as do, and one more. */
export async function follow(scores: readonly Scores[], drafts: readonly number[], text: Following): Promise<number[]> {
  const { options, random, known, ends, stats } = text
  const made: number[] = []
  for (const [i, each] of scores.entries()) {
    const allowed = await options.constraint?.allowed()
    const penalized = penalize(each, known, options, allowed)
    const last = i === drafts.length
    const { token, accepted } = last
      ? { token: sample(penalized, options, random), accepted: false }
      : verifyDraft(penalized, drafts[i], options, random)
    made.push(token)
    known.add(token)
    options.constraint?.accept(token)
    if (!last) stats.drafted[i]++
    if (accepted) stats.accepted[i]++
    if (!accepted || ends.has(token)) break
  }
  return made
}

/** Whether a drafted token stands, and the one that does. */
export function verifyDraft(
  scores: Scores,
  draft: number,
  options: SamplingOptions,
  random: Random,
): { token: number; accepted: boolean } {
  if (typeof scores !== 'number') return acceptOrDraw(restrict(scores, options), draft, random)
  return { token: scores, accepted: scores === draft }
}

// Vocabularies have 100,000 tokens and more, and this is done for each of a text: plain loops, whose length is a constant, as an inlined one that reads
// the array's takes five times as long.

/** From logits, of which those of `before` are penalized and only those of `allowed` left, to scores. Where neither is asked for they are that by now. */
export function penalize(
  scores: Scores,
  before: Iterable<number>,
  options: SamplingOptions,
  allowed: AllowedTokens = null,
): Scores {
  const { temperature = 0, repetitionPenalty = 1 } = options
  if (typeof scores === 'number' || !needsLogits(options)) return scores
  if (repetitionPenalty !== 1) {
    for (const token of before) {
      scores[token] = scores[token] < 0 ? scores[token] * repetitionPenalty : scores[token] / repetitionPenalty
    }
  }
  if (allowed) leaveOut(scores, allowed)
  const { length } = scores
  let best = 0
  while (scores[best] === -Infinity) best++
  if (best === length) {
    const problem = 'of all tokens none is allowed by the constraint'
    const fix = 'leave at least one: where nothing may follow, a token that ends the text'
    throw new MoeError({ code: 'E_ATTR', op: 'generate', problem, fix })
  }
  for (let i = best + 1; i < length; i++) if (scores[i] > scores[best]) best = i
  if (!isDrawn(options)) return best
  const largest = scores[best]
  for (let i = 0; i < length; i++) scores[i] = Math.exp((scores[i] - largest) / temperature)
  return scores
}

function leaveOut(logits: Float32Array, allowed: Int32Array | Uint32Array): void {
  const { length } = logits
  for (let start = 0; start < length; start += 32) {
    // All zeros behind the last.
    const word = allowed[start >> 5]
    if (~word === 0) continue
    const end = Math.min(length, start + 32)
    for (let i = start; i < end; i++) if (((word >>> (i & 31)) & 1) === 0) logits[i] = -Infinity
  }
}

/** Leaves `topK` of the probabilities, of these `topP` and `minP`, and makes the others 0. */
export function restrict(p: Float32Array, { topK = Infinity, topP = 1, minP = 0 }: SamplingOptions): Float32Array {
  const { length } = p
  let [largest, sum] = [0, 0]
  for (let i = 0; i < length; i++) {
    if (p[i] > largest) largest = p[i]
    sum += p[i]
  }
  let [floor, equals] = [minP * largest, length]
  if (topK < length || topP < 1) {
    const front = frontOf(p, sum, floor, topK, topP)
    if (front.least >= floor) ({ least: floor, equals } = front)
  }
  if (floor === 0) return p
  for (let i = 0; i < length; i++) if (p[i] < floor || (p[i] === floor && --equals < 0)) p[i] = 0
  return p
}

/**
 * Of the `topK` largest, or all, the fewest that reach the share `topP` of their sum, or those of them from `floor` up: the least, and how many are as small as
 * that. `sum` is that of all.
 */
function frontOf(
  p: Float32Array,
  sum: number,
  floor: number,
  topK: number,
  topP: number,
): { least: number; equals: number } {
  const { length } = p
  const limited = topK < length
  // Only what may be among them needs an order. Numbers below the mean of what may be left out add up to less than that.
  const bound = limited ? leastOfParts(p, topK) : Math.max(floor, (sum - topP * sum) / length)
  let candidates = 0
  for (let i = 0; i < length; i++) if (p[i] >= bound) candidates++
  const sorted = new Float32Array(candidates)
  candidates = 0
  for (let i = 0; i < length; i++) if (p[i] >= bound) sorted[candidates++] = p[i]
  sorted.sort()
  const end = sorted.length
  const start = limited ? end - topK : 0
  let all = limited ? 0 : sum
  if (limited) for (let i = end - 1; i >= start; i--) all += sorted[i]
  // Sums of f64 reach that of all before the last of small ones.
  const mass = topP < 1 ? topP * all : Infinity
  let reached = 0
  let at = end
  while (at > start && reached < mass) reached += sorted[--at]
  const least = sorted[at]
  let above = at
  while (above < end && sorted[above] === least) above++
  return { least, equals: above - at }
}

/** Each of `parts` parts has its largest number: as many are no smaller than the least of these. */
function leastOfParts(p: Float32Array, parts: number): number {
  const { length } = p
  const largest = new Float32Array(parts)
  let part = 0
  for (let i = 0; i < length; i++) {
    if (p[i] > largest[part]) largest[part] = p[i]
    if (++part === parts) part = 0
  }
  return largest.reduce((least, x) => Math.min(least, x))
}

/** Draws from what is left, in proportion. */
export function draw(p: Float32Array, random: Random): number {
  const { length } = p
  let total = 0
  for (let i = 0; i < length; i++) total += p[i]
  const at = random.next() * total
  let sum = 0
  let last = 0
  for (let i = 0; i < length; i++) {
    if (p[i] === 0) continue
    sum += p[i]
    last = i
    if (at < sum) return i
  }
  return last
}

/**
 * Keeps a drafted token with its own probability, else draws from the rest: the result is distributed exactly as `p`
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
