/** @file From logits to a token: to probabilities on the device, and to one of them here. */
import { MoeError, type Random, softmax, type Tensor } from '@moe/core'

export interface SamplingOptions {
  /** 0 takes the likeliest token, always the same; 1 draws as the model says. Default 0. */
  readonly temperature?: number
  /** Smallest set of tokens whose probability reaches this. */
  readonly topP?: number
  /** Only tokens at least this share of the likeliest one's probability. */
  readonly minP?: number
}

/** What follows a token: the probabilities of all, or, where nothing is drawn, the likeliest. */
export type Scores = Float32Array | number

/** Temperatures below this are 0: their reciprocal is about to leave f32. */
const coldest = 1e-30

/** Where the logits `[..., V]` are: probabilities at that temperature, or the likeliest tokens `i32 [..., 1]`, the lowest of equals, at 0. */
export function scoresOf(logits: Tensor, { temperature = 0 }: SamplingOptions): Tensor {
  if (temperature < coldest) return logits.topk(1).indices
  return softmax(logits.sub(logits.max(-1, true)).mul(1 / temperature))
}

/** @throws MoeError E_ATTR for a value outside its range. */
export function checkSampling(options: SamplingOptions & { readonly seed?: number }): void {
  const { temperature = 0, topP = 1, minP = 0 } = options
  const problems: string[] = []
  const idle = (['topP', 'minP', 'seed'] as const).filter(name => options[name] !== undefined)
  if (options.temperature === undefined && idle.length > 0) {
    problems.push(`${idle.join(', ')} would do nothing, as nothing is drawn without a temperature: pass temperature: 1`)
  }
  if (!(temperature >= 0)) problems.push(`temperature = ${temperature} is negative`)
  if (!(topP > 0 && topP <= 1)) problems.push(`topP = ${topP} is not in (0, 1]`)
  if (!(minP >= 0 && minP <= 1)) problems.push(`minP = ${minP} is not in [0, 1]`)
  if (problems.length > 0) throw new MoeError({ code: 'E_ATTR', op: 'generate', problem: problems.join('; ') })
}

/** The next token. Probabilities that are left out become 0. */
export function sample(scores: Scores, options: SamplingOptions, random: Random): number {
  return typeof scores === 'number' ? scores : draw(restrict(scores, options), random)
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

/** Leaves `topP` and `minP` of the probabilities and makes the others 0. */
export function restrict(p: Float32Array, { topP = 1, minP = 0 }: SamplingOptions): Float32Array {
  const { length } = p
  let [largest, sum] = [0, 0]
  for (let i = 0; i < length; i++) {
    if (p[i] > largest) largest = p[i]
    sum += p[i]
  }
  let [floor, equals] = [minP * largest, length]
  if (topP < 1) ({ least: floor, equals } = nucleusOf(p, sum, topP, floor))
  if (floor === 0) return p
  for (let i = 0; i < length; i++) if (p[i] < floor || (p[i] === floor && --equals < 0)) p[i] = 0
  return p
}

/** The smallest set of numbers from `floor` up that reaches the share `topP` of the sum of all, or all of them: the least, and how many are as small as that. */
function nucleusOf(p: Float32Array, sum: number, topP: number, floor: number): { least: number; equals: number } {
  const { length } = p
  const mass = topP * sum
  // Those below the mean of what may be left out add up to less than that, so they are outside, and only the others need an order.
  const bound = Math.max(floor, (sum - mass) / length)
  let candidates = 0
  for (let i = 0; i < length; i++) if (p[i] >= bound) candidates++
  const sorted = new Float32Array(candidates)
  candidates = 0
  for (let i = 0; i < length; i++) if (p[i] >= bound) sorted[candidates++] = p[i]
  sorted.sort()
  let reached = 0
  let at = sorted.length
  while (at > 0 && reached < mass) reached += sorted[--at]
  const least = sorted[at]
  let end = at
  while (end < sorted.length && sorted[end] === least) end++
  return { least, equals: end - at }
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
export function acceptOrDraw(p: Float32Array, draft: number, random: Random): { token: number; accepted: boolean } {
  const { length } = p
  let total = 0
  for (let i = 0; i < length; i++) total += p[i]
  if (p[draft] > 0 && random.next() * total < p[draft]) return { token: draft, accepted: true }
  const rest = p.slice()
  rest[draft] = 0
  return { token: draw(rest, random), accepted: false }
}
