/** @file Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The same bits on every backend. */
import type { Shape } from './backend.ts'
import { sizeOf } from './shape.ts'
import { type CreateOptions, fromHost, type Tensor } from './tensor.ts'

/** High 32 bits of the 64-bit product of two 32-bit words. */
function mulHigh(a: number, b: number): number {
  const a0 = a & 0xffff
  const a1 = a >>> 16
  const b0 = b & 0xffff
  const b1 = b >>> 16
  const low = a0 * b0
  const mid1 = a1 * b0 + (low >>> 16)
  const mid2 = a0 * b1 + (mid1 & 0xffff)
  return (a1 * b1 + Math.floor(mid1 / 65536) + (mid2 >>> 16)) >>> 0
}

/** One block: four random words from a 128-bit counter and a 64-bit key. */
export function philox4x32(counter: readonly number[], key: readonly number[], out: Uint32Array, at = 0): void {
  let [c0, c1, c2, c3] = counter
  let [k0, k1] = key
  for (let round = 0; round < 10; round++) {
    const high0 = mulHigh(0xd2511f53, c0)
    const low0 = Math.imul(0xd2511f53, c0)
    const high1 = mulHigh(0xcd9e8d57, c2)
    const low1 = Math.imul(0xcd9e8d57, c2)
    c0 = (high1 ^ c1 ^ k0) >>> 0
    c1 = low1 >>> 0
    c2 = (high0 ^ c3 ^ k1) >>> 0
    c3 = low0 >>> 0
    k0 = (k0 + 0x9e3779b9) >>> 0
    k1 = (k1 + 0xbb67ae85) >>> 0
  }
  out[at] = c0
  out[at + 1] = c1
  out[at + 2] = c2
  out[at + 3] = c3
}

/**
 * A stream of random numbers named by a seed and a stream number. Its position is data (`position`), so that a run resumes
 * exactly; streams never overlap.
 */
export class Random {
  readonly seed: number
  readonly stream: number
  /** Blocks of four words drawn so far. */
  position: number
  #words = new Uint32Array(4)

  constructor(seed: number, stream = 0, position = 0) {
    this.seed = seed
    this.stream = stream
    this.position = position
  }

  /** An independent generator, named by a number or a text (a parameter's name, say) within this seed. */
  fork(name: number | string): Random {
    let hash = 0x811c9dc5
    for (const char of `${this.stream}/${name}`)
      hash = Math.imul(hash ^ (char.codePointAt(0) as number), 0x01000193) >>> 0
    return new Random(this.seed, hash)
  }

  #block(): Uint32Array {
    const at = this.position++
    const counter = [at >>> 0, Math.floor(at / 4294967296) >>> 0, this.stream >>> 0, 0]
    philox4x32(counter, [this.seed >>> 0, Math.floor(this.seed / 4294967296) >>> 0], this.#words)
    return this.#words
  }

  /** One uniform number in [0, 1), of 53 random bits. */
  next(): number {
    const words = this.#block()
    return ((words[0] >>> 5) * 67108864 + (words[1] >>> 6)) / 9007199254740992
  }

  /** An integer in 0 .. n-1. */
  integer(n: number): number {
    return Math.floor(this.next() * n)
  }

  /** Uniform numbers in [0, 1), f32. */
  uniform(length: number): Float32Array {
    const out = new Float32Array(length)
    for (let i = 0; i < length; i += 4) {
      const words = this.#block()
      for (let j = 0; j < 4 && i + j < length; j++) out[i + j] = (words[j] >>> 8) / 16777216
    }
    return out
  }

  /** Normal numbers of mean 0 and the given standard deviation, f32 (Box-Muller in f64). */
  normal(length: number, deviation = 1): Float32Array {
    const out = new Float32Array(length)
    for (let i = 0; i < length; i += 4) {
      const words = this.#block()
      for (let j = 0; j < 4 && i + j < length; j += 2) {
        const radius = deviation * Math.sqrt(-2 * Math.log((words[j] + 1) / 4294967297))
        const angle = 2 * Math.PI * (words[j + 1] / 4294967296)
        out[i + j] = radius * Math.cos(angle)
        if (i + j + 1 < length) out[i + j + 1] = radius * Math.sin(angle)
      }
    }
    return out
  }

  /** Shuffles an array in place (Fisher-Yates). */
  shuffle<T extends { [index: number]: number | unknown; length: number }>(items: T): T {
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.integer(i + 1)
      const swap = items[i]
      items[i] = items[j]
      items[j] = swap
    }
    return items
  }
}

/** A tensor of normal numbers. */
export function randn(
  shape: Shape,
  random: Random,
  options: { deviation?: number; backend?: CreateOptions['backend'] } = {},
): Tensor {
  return fromHost(random.normal(sizeOf(shape), options.deviation), shape, 'f32', options.backend)
}

/** A tensor of uniform numbers in [low, high). */
export function rand(
  shape: Shape,
  random: Random,
  options: { low?: number; high?: number; backend?: CreateOptions['backend'] } = {},
): Tensor {
  const { low = 0, high = 1, backend } = options
  const values = random.uniform(sizeOf(shape))
  for (let i = 0; i < values.length; i++) values[i] = low + (high - low) * values[i]
  return fromHost(values, shape, 'f32', backend)
}
