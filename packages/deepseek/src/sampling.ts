/** @file From logits to a token. */
import { MoeError, type Random } from '@moe/core'

export interface SamplingOptions {
  /** 0 (default) takes the likeliest token. */
  readonly temperature?: number
  /** Smallest set of tokens whose probability reaches this. */
  readonly topP?: number
  /** Only tokens at least this share of the likeliest one's probability. */
  readonly minP?: number
}

/** What follows a token: logits to draw from, or, where nothing is drawn, the likeliest token. */
export type Scores = Float32Array | number

/** @throws MoeError E_ATTR for a value outside its range. */
export function checkSampling({ temperature = 0, topP = 1, minP = 0 }: SamplingOptions): void {
  const problems: string[] = []
  if (!(temperature >= 0)) problems.push(`temperature = ${temperature} is negative`)
  if (!(topP > 0 && topP <= 1)) problems.push(`topP = ${topP} is not in (0, 1]`)
  if (!(minP >= 0 && minP <= 1)) problems.push(`minP = ${minP} is not in [0, 1]`)
  if (problems.length > 0) throw new MoeError({ code: 'E_ATTR', op: 'generate', problem: problems.join('; ') })
}

/** The next token. */
export function sample(scores: Scores, options: SamplingOptions, random: Random): number {
  return typeof scores === 'number' ? scores : draw(distribution(scores, options), random)
}

/** Whether a drafted token stands, and the one that does. */
export function verifyDraft(
  scores: Scores,
  draft: number,
  options: SamplingOptions,
  random: Random,
): { token: number; accepted: boolean } {
  if (typeof scores !== 'number') return acceptOrDraw(distribution(scores, options), draft, random)
  return { token: scores, accepted: scores === draft }
}

/** The distribution to draw from, at a temperature above 0. */
export function distribution(logits: Float32Array, options: SamplingOptions): Float64Array {
  const { temperature = 1, topP = 1, minP = 0 } = options
  // Inlined, a loop that reads the array's length takes five times as long.
  const { length } = logits
  let largest = Number.NEGATIVE_INFINITY
  for (let i = 0; i < length; i++) if (logits[i] > largest) largest = logits[i]
  const p = new Float64Array(length)
  let sum = 0
  for (let i = 0; i < length; i++) sum += p[i] = Math.exp((logits[i] - largest) / temperature)
  for (let i = 0; i < length; i++) p[i] /= sum
  const floor = minP / sum
  if (topP < 1) keepNucleus(p, topP)
  for (let i = 0; i < length; i++) if (p[i] < floor) p[i] = 0
  return normalize(p)
}

/** Zeros but for the smallest set that reaches `topP`, the lowest of equals first. */
function keepNucleus(p: Float64Array, topP: number): void {
  // Those below the mean of the rest add up to less than the rest, so they are outside, and only the others need an order.
  const least = (1 - topP) / p.length
  const candidates: number[] = []
  for (let i = 0; i < p.length; i++) {
    if (p[i] < least) p[i] = 0
    else candidates.push(i)
  }
  candidates.sort((a, b) => p[b] - p[a] || a - b)
  let mass = 0
  for (const i of candidates) {
    if (mass >= topP) p[i] = 0
    mass += p[i]
  }
}

/** Draws from a distribution. */
export function draw(p: Float64Array, random: Random): number {
  const at = random.next()
  let sum = 0
  let last = 0
  for (let i = 0; i < p.length; i++) {
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
export function acceptOrDraw(p: Float64Array, draft: number, random: Random): { token: number; accepted: boolean } {
  if (p[draft] > 0 && random.next() < p[draft]) return { token: draft, accepted: true }
  const rest = p.slice()
  rest[draft] = 0
  return { token: draw(normalize(rest), random), accepted: false }
}

function normalize(p: Float64Array): Float64Array {
  const sum = p.reduce((total, x) => total + x, 0)
  for (let i = 0; i < p.length; i++) p[i] /= sum
  return p
}
