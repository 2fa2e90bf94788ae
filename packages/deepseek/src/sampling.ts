/** @file Sampling: from logits to probabilities on the device, and from probabilities to a token on the host. */
import { MoeError, type Random, shown, softmax, type Tensor } from '@moe/core'

/** A bit mask of token ids, or null for all tokens: bit `id % 32` of word `id / 32`. */
export type AllowedTokens = Int32Array | Uint32Array | null

/** Restricts which tokens may come next, for example to those of a grammar. Use one object per text. */
export interface TokenConstraint {
  /**
   * Returns the allowed tokens, called before each token: bit `id % 32` of word `id / 32` is 1 for an allowed token; ids beyond the last word are not allowed. Null allows all. The array is
   * read immediately and may be reused. Generation waits for a promise. If no token is allowed, it fails with E_ATTR.
   */
  allowed(): AllowedTokens | Promise<AllowedTokens>
  /** Called with each chosen token, including one that ends the text. */
  accept(token: number): void
}

/**
 * How the next token is chosen. In this order: the logit bias and the penalties (repetition, frequency and presence) are applied, tokens that the constraint does not allow are removed, logits are divided by the
 * temperature, and `topK`, `topP` and `minP` remove tokens.
 */
export interface SamplingOptions {
  /** 0 always chooses the most likely token; 1 samples from the model's distribution. Default 0. */
  readonly temperature?: number | undefined
  /** Keeps only this many of the most likely tokens. */
  readonly topK?: number | undefined
  /** Keeps the smallest set of the remaining most likely tokens whose probabilities reach this share of their sum (nucleus sampling). */
  readonly topP?: number | undefined
  /** Keeps only tokens whose probability is at least this share of the highest one. */
  readonly minP?: number | undefined
  /**
   * Divides the logits of all tokens that occur in the prompt or the generated text by this number, or multiplies them if they are negative. Values above 1 reduce repetition, also at temperature 0
   * (Keskar et al. 2019, "CTRL"). Usually 1.2. Default 1.
   */
  readonly repetitionPenalty?: number | undefined
  /**
   * Subtracts this number from the logit of a token for each time that it occurs in the generated text, as in OpenAI's API; the prompt does not count. From -2 to 2; values above 0 reduce repetition. Default 0.
   */
  readonly frequencyPenalty?: number | undefined
  /** Subtracts this number once from the logits of all tokens that occur in the generated text, as in OpenAI's API. From -2 to 2. Default 0. */
  readonly presencePenalty?: number | undefined
  /** Numbers from -100 to 100 that are added to the logits of tokens, by id, as in OpenAI's API. -100 practically excludes a token, 100 practically forces it. Default: none. */
  readonly logitBias?: Readonly<Record<number, number>> | undefined
  /** Restricts which tokens may come next. Default: all tokens. */
  readonly constraint?: TokenConstraint | undefined
}

/** How the next token is scored. */
export interface Scoring extends SamplingOptions {
  /** Number of token ids that may be generated. */
  readonly vocabulary: number
}

/** Scores of the next token: the probabilities of all tokens, or the most likely token if nothing is sampled. */
export type Scores = Float32Array | number

/** Lower temperatures count as 0, since their reciprocal would overflow f32. */
const minTemperature = 1e-30

/** Whether a token is sampled, rather than the most likely one chosen. */
export const isDrawn = ({ temperature = 0 }: SamplingOptions): boolean => temperature >= minTemperature

/** Whether an option applies to the logits on the host: see `processLogits`. */
export function needsLogits(options: SamplingOptions): boolean {
  const { repetitionPenalty = 1, frequencyPenalty = 0, presencePenalty = 0, logitBias, constraint } = options
  const isPenalized = repetitionPenalty !== 1 || frequencyPenalty !== 0 || presencePenalty !== 0
  return isPenalized || constraint !== undefined || logitBias !== undefined
}

/**
 * Scores logits `[..., V]` on their device. Returns probabilities or, at temperature 0, the most likely token `i32 [..., 1]` (the lowest id of equals). Returns the logits if `needsLogits`.
 */
export function scoresOf(all: Tensor, options: Partial<Scoring> = {}): Tensor {
  const { temperature = 0, vocabulary } = options
  const logits = vocabulary === undefined ? all : limitVocabulary(all, vocabulary)
  if (needsLogits(options)) return logits
  return isDrawn(options) ? probabilitiesOf(logits, 1 / temperature) : logits.topk(1).indices
}

/** Returns the logits of the first `vocabulary` tokens, `[..., vocabulary]`. */
export const limitVocabulary = (logits: Tensor, vocabulary: number): Tensor =>
  vocabulary < (logits.shape.at(-1) as number) ? logits.narrow(-1, 0, vocabulary) : logits

/** Returns the probabilities of logits `[..., V]` with a reciprocal temperature: one for all, or one per row. */
export function probabilitiesOf(logits: Tensor, inverseTemperature: Tensor | number): Tensor {
  return softmax(logits.sub(logits.max(-1, true)).mul(inverseTemperature))
}

/** @throws MoeError E_ATTR for values out of range */
export function checkSampling(options: SamplingOptions & { readonly seed?: number }): void {
  const { temperature = 0, topK = 1, topP = 1, minP = 0, repetitionPenalty = 1, logitBias, constraint } = options
  const { seed = 0 } = options
  const problems: string[] = []
  const idle = (['topK', 'topP', 'minP', 'seed'] as const).filter(name => options[name] !== undefined)
  if (options.temperature === undefined && idle.length > 0) {
    problems.push(`without a temperature, ${idle.join(', ')} would have no effect; pass temperature: 1`)
  }
  // Infinity would give excluded tokens, whose logits are -Infinity, the score NaN.
  if (!atLeast0(temperature) || temperature === Infinity)
    problems.push(`temperature = ${shown(temperature)}, expected a finite number of at least 0`)
  if (!(Number.isInteger(topK) && topK > 0)) problems.push(`topK = ${shown(topK)}, expected a positive integer`)
  if (!(atLeast0(topP) && topP > 0 && topP <= 1)) problems.push(`topP = ${shown(topP)}, expected a number in (0, 1]`)
  if (!(atLeast0(minP) && minP <= 1)) problems.push(`minP = ${shown(minP)}, expected a number in [0, 1]`)
  if (!Number.isSafeInteger(seed)) problems.push(`seed = ${shown(seed)}, expected an integer below 2^53`)
  if (!(Number.isFinite(repetitionPenalty) && repetitionPenalty > 0)) {
    problems.push(`repetitionPenalty = ${shown(repetitionPenalty)}, expected a positive number`)
  }
  for (const name of ['frequencyPenalty', 'presencePenalty'] as const) {
    const { [name]: penalty = 0 } = options
    if (!isWithin(penalty, 2)) problems.push(`${name} = ${shown(penalty)}, expected a number from -2 to 2`)
  }
  if (logitBias !== undefined && !isBias(logitBias)) {
    problems.push(`logitBias = ${shown(logitBias)}, expected numbers from -100 to 100 by token id`)
  }
  if (constraint !== undefined && !(isFunction(constraint?.allowed) && isFunction(constraint.accept))) {
    problems.push('constraint lacks the functions allowed and accept')
  }
  if (problems.length > 0) throw new MoeError({ code: 'E_ATTR', op: 'generate', problem: problems.join('; ') })
}

/** Excludes NaN, and strings that JavaScript would convert to numbers. */
export const atLeast0 = (value: unknown): value is number => typeof value === 'number' && value >= 0

const isBias = (value: unknown): boolean =>
  typeof value === 'object' &&
  value !== null &&
  Object.entries(value).every(([id, bias]) => /^(0|[1-9]\d*)$/.test(id) && isWithin(bias, 100))

const isWithin = (value: unknown, bound: number): boolean => typeof value === 'number' && Math.abs(value) <= bound

const isFunction = (value: unknown): boolean => typeof value === 'function'

/** Chooses the next token. Overwrites `scores`: removed probabilities become 0. */
export function sample(scores: Scores, options: SamplingOptions, random: Random): number {
  return typeof scores === 'number' ? scores : draw(restrict(scores, options), random)
}

// These loops run over the whole vocabulary (100,000 tokens and more) for every generated token. They are plain and have a constant length, since an inlined loop
// that reads the array's length is five times slower.

/** Applies `topK`, `topP` and `minP` to probabilities, in place: removed ones become 0. */
export function restrict(p: Float32Array, { topK = Infinity, topP = 1, minP = 0 }: SamplingOptions): Float32Array {
  const { length } = p
  let [largest, sum] = [0, 0]
  for (let i = 0; i < length; i++) {
    if (p[i] > largest) largest = p[i]
    sum += p[i]
  }
  let [floor, equals] = [minP * largest, length]
  if (topK < length || topP < 1) {
    const front = cutoff(p, sum, floor, topK, topP)
    if (front.least >= floor) ({ least: floor, equals } = front)
  }
  if (floor === 0) return p
  for (let i = 0; i < length; i++) if (p[i] < floor || (p[i] === floor && --equals < 0)) p[i] = 0
  return p
}

/**
 * Finds the smallest probability that `topK` and `topP` keep, ignoring those below `floor`, and how many equal ones are kept. `sum` is the sum of all.
 */
function cutoff(
  p: Float32Array,
  sum: number,
  floor: number,
  topK: number,
  topP: number,
): { least: number; equals: number } {
  const limited = topK < p.length
  // Only the smallest kept value must be found, so only values near it are sorted.
  const { from, below, above } = limited
    ? { from: lowerBound(p, topK), below: Infinity, above: 0 }
    : nucleus(p, floor, topP * sum)
  const sorted = valuesBetween(p, from, below)
  const end = sorted.length
  const start = limited ? end - topK : 0
  let all = limited ? 0 : sum
  if (limited) for (let i = end - 1; i >= start; i--) all += sorted[i]
  // In f64, the sum may reach that of all before the last small values are added.
  const mass = topP < 1 ? topP * all : Infinity
  let reached = above
  let at = end
  while (at > start && reached < mass) reached += sorted[--at]
  const least = sorted[at]
  let equal = at
  while (equal < end && sorted[equal] === least) equal++
  return { least, equals: equal - at }
}

/** The values from `from` to below `below`, in increasing order. */
function valuesBetween(p: Float32Array, from: number, below: number): Float32Array {
  const { length } = p
  let count = 0
  for (let i = 0; i < length; i++) if (p[i] >= from && p[i] < below) count++
  const values = new Float32Array(count)
  count = 0
  for (let i = 0; i < length; i++) if (p[i] >= from && p[i] < below) values[count++] = p[i]
  return values.sort()
}

/** Values are grouped by the first 16 of their bits, since positive floats have the order of their bits. */
const groups = new Float64Array(2 ** 16)
const INFINITY_GROUP = 0x7f80
const firstOf = (group: number) => new Float32Array(Uint32Array.of(group << 16).buffer)[0]

/** The range of values in which the sum of the largest values reaches `mass`, or that contains `floor`, and the sum of the values above. */
function nucleus(p: Float32Array, floor: number, mass: number): { from: number; below: number; above: number } {
  const { length } = p
  const bits = new Uint32Array(p.buffer, p.byteOffset, length)
  groups.fill(0)
  for (let i = 0; i < length; i++) groups[bits[i] >>> 16] += p[i]
  const last = new Uint32Array(Float32Array.of(floor).buffer)[0] >>> 16
  let group = INFINITY_GROUP - 1
  let above = 0
  while (group > last && above + groups[group] < mass) above += groups[group--]
  return { from: firstOf(group), below: firstOf(group + 1), above }
}

/** A lower bound of the `parts`-th largest value: the least of the maxima of that many parts. */
function lowerBound(p: Float32Array, parts: number): number {
  const { length } = p
  const largest = new Float32Array(parts)
  let part = 0
  for (let i = 0; i < length; i++) {
    if (p[i] > largest[part]) largest[part] = p[i]
    if (++part === parts) part = 0
  }
  return largest.reduce((least, x) => Math.min(least, x))
}

/** The error for NaN instead of scores, from which any token would be chosen, even one that a constraint excludes. */
export const notNumbers = (): MoeError =>
  new MoeError({
    code: 'E_NAN',
    op: 'generate',
    problem: 'the scores of the next token are NaN',
    fix: 'check the weights of the model, or use a higher precision',
  })

/** Samples an index in proportion to `p`. @throws MoeError E_NAN */
export function draw(p: Float32Array, random: Random): number {
  const { length } = p
  let total = 0
  for (let i = 0; i < length; i++) total += p[i]
  if (Number.isNaN(total)) throw notNumbers()
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
