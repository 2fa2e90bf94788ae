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

/** @throws MoeError E_ATTR for a value outside its range. */
export function checkSampling({ temperature = 0, topP = 1, minP = 0 }: SamplingOptions): void {
  const problems: string[] = []
  if (!(temperature >= 0)) problems.push(`temperature = ${temperature} is negative`)
  if (!(topP > 0 && topP <= 1)) problems.push(`topP = ${topP} is not in (0, 1]`)
  if (!(minP >= 0 && minP <= 1)) problems.push(`minP = ${minP} is not in [0, 1]`)
  if (problems.length > 0) throw new MoeError({ code: 'E_ATTR', op: 'generate', problem: problems.join('; ') })
}

/** Position of the largest value, the lowest of equals. */
export function argmax(values: ArrayLike<number>): number {
  let best = 0
  let largest = values[0]
  // Inlined, a loop that reads the array's length takes five times as long.
  const { length } = values
  for (let i = 1; i < length; i++) {
    const value = values[i]
    if (value > largest) {
      largest = value
      best = i
    }
  }
  return best
}

/** The next token. */
export function sample(logits: Float32Array, options: SamplingOptions, random: Random): number {
  const { temperature = 0 } = options
  return temperature === 0 ? argmax(logits) : draw(distribution(logits, options), random)
}

/** Whether a drafted token stands, and the one that does. */
export function verifyDraft(
  logits: Float32Array,
  draft: number,
  options: SamplingOptions,
  random: Random,
): { token: number; accepted: boolean } {
  const { temperature = 0 } = options
  if (temperature > 0) return acceptOrDraw(distribution(logits, options), draft, random)
  const token = argmax(logits)
  return { token, accepted: token === draft }
}

/** The distribution to draw from: all mass on the likeliest token at temperature 0. */
export function distribution(logits: Float32Array, options: SamplingOptions): Float64Array {
  const { temperature = 0, topP = 1, minP = 0 } = options
  const p = new Float64Array(logits.length)
  const best = argmax(logits)
  if (temperature === 0) {
    p[best] = 1
    return p
  }
  let sum = 0
  for (let i = 0; i < p.length; i++) sum += p[i] = Math.exp((logits[i] - logits[best]) / temperature)
  for (let i = 0; i < p.length; i++) p[i] /= sum
  const floor = minP * p[best]
  if (topP < 1) {
    const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a] || a - b)
    let mass = 0
    for (const i of order) {
      if (mass >= topP) p[i] = 0
      mass += p[i]
    }
  }
  for (let i = 0; i < p.length; i++) if (p[i] < floor) p[i] = 0
  return normalize(p)
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
