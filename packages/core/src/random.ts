/**
 * @file Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
 * 3"). The same bits on every backend.
 */
import { attrError, isSize } from './checks.ts'
import { describe, shown } from './errors.ts'

// Local names: in a context of node:vm, such as a test of Jest, each use of a global costs 100 ns or more.
const { clz32, floor, imul, sqrt, LN2, SQRT2 } = Math

/** High 32 bits of the product of an unsigned word and the multiplier `high * 65536 + low`, as an i32. */
function mulHigh(high: number, low: number, word: number): number {
  const w0 = word & 0xffff
  const w1 = word >>> 16
  const middle = (imul(high, w0) + (imul(low, w0) >>> 16)) | 0
  const other = (imul(low, w1) + (middle & 0xffff)) | 0
  return (imul(high, w1) + (middle >>> 16) + (other >>> 16)) | 0
}

/** Computes one block: four random words from a 128-bit counter and a 64-bit key, written to `out` at `at`. */
export function philox4x32(counter: readonly number[], key: readonly number[], out: Uint32Array, at = 0): void {
  const [c0, c1, c2, c3] = counter
  block(c0 | 0, c1 | 0, c2 | 0, c3 | 0, key[0] | 0, key[1] | 0, out, at)
}

/** `philox4x32` with i32 words, which JavaScript engines keep in registers. */
function block(
  c0: number,
  c1: number,
  c2: number,
  c3: number,
  k0: number,
  k1: number,
  out: Uint32Array,
  at: number,
): void {
  for (let round = 0; round < 10; round++) {
    const high0 = mulHigh(0xd251, 0x1f53, c0)
    const low0 = imul(0xd2511f53, c0)
    const high1 = mulHigh(0xcd9e, 0x8d57, c2)
    const low1 = imul(0xcd9e8d57, c2)
    c0 = high1 ^ c1 ^ k0
    c1 = low1
    c2 = high0 ^ c3 ^ k1
    c3 = low0
    k0 = (k0 + 0x9e3779b9) | 0
    k1 = (k1 + 0xbb67ae85) | 0
  }
  out[at] = c0
  out[at + 1] = c1
  out[at + 2] = c2
  out[at + 3] = c3
}

function needLength(op: string, length: number): void {
  if (isSize(length)) return
  throw attrError(
    op,
    `the length is ${shown(length)}, expected a non-negative integer`,
    'pass how many numbers to draw',
  )
}

/** Words generated per batch. */
const batch = 512

/**
 * A stream of random numbers, identified by a seed and a stream number; streams never overlap. The three fields are its
 * complete state: assign those of another generator to continue as that one would.
 */
export class Random {
  /** Key of the generator, an integer below 2^53. */
  seed: number
  /** Number of the stream within the seed, 32 bits. */
  stream: number
  /** Number of blocks of four words drawn so far. */
  position: number
  readonly #words = new Uint32Array(batch)

  /**
   * Creates the stream, starting at block number `position`.
   * @throws MoeError E_ATTR if the seed is not an integer, the stream has more than 32 bits, or the position is negative
   */
  constructor(seed: number, stream = 0, position = 0) {
    if (!Number.isSafeInteger(seed))
      throw attrError('Random', `the seed is ${shown(seed)}`, 'pass an integer below 2^53: new Random(1)')
    if (!isSize(stream) || stream >= 2 ** 32)
      throw attrError('Random', `the stream is ${shown(stream)}`, 'pass an integer from 0 to 4294967295')
    if (!isSize(position))
      throw attrError('Random', `the position is ${shown(position)}`, 'pass a number of blocks: 0, 1, …')
    this.seed = seed
    this.stream = stream
    this.position = position
  }

  /**
   * Returns an independent generator within this seed, identified by a number or a name (of a parameter, for example).
   */
  fork(name: number | string): Random {
    let hash = 0x811c9dc5
    for (const char of `${this.stream}/${name}`) hash = imul(hash ^ (char.codePointAt(0) as number), 0x01000193) >>> 0
    return new Random(this.seed, hash)
  }

  /** Generates the next `count` words, rounded up to whole blocks. The result is valid until the next call. */
  #draw(count: number): Uint32Array {
    const words = this.#words
    const k0 = this.seed | 0
    const k1 = floor(this.seed / 4294967296) | 0
    for (let i = 0; i < count; i += 4) {
      const at = this.position++
      block(at | 0, floor(at / 4294967296) | 0, this.stream | 0, 0, k0, k1, words, i)
    }
    return words
  }

  /** Returns a uniform number in [0, 1) with 53 random bits. */
  next(): number {
    const words = this.#draw(4)
    return ((words[0] >>> 5) * 67108864 + (words[1] >>> 6)) / 9007199254740992
  }

  /** Returns a uniform integer in 0 .. n-1. @throws MoeError E_ATTR if n is not a positive integer */
  integer(n: number): number {
    if (!Number.isSafeInteger(n) || n < 1) {
      throw attrError('Random.integer', `n is ${shown(n)}, expected a positive integer`, 'pass the number of values')
    }
    return floor(this.next() * n)
  }

  /** Returns `length` uniform f32 numbers in [0, 1). @throws MoeError E_ATTR for an invalid length */
  uniform(length: number): Float32Array {
    needLength('Random.uniform', length)
    const out = new Float32Array(length)
    for (let i = 0; i < length; i += batch) {
      const count = Math.min(batch, length - i)
      const words = this.#draw(count)
      for (let j = 0; j < count; j++) out[i + j] = (words[j] >>> 8) / 16777216
    }
    return out
  }

  /**
   * Returns `length` normal f32 numbers with mean 0 and the given standard deviation (Box-Muller in f64).
   * @throws MoeError E_ATTR for an invalid length or deviation
   */
  normal(length: number, std = 1): Float32Array {
    needLength('Random.normal', length)
    if (!(Number.isFinite(std) && std >= 0)) {
      throw attrError(
        'Random.normal',
        `std is ${shown(std)}, expected a number of at least 0`,
        'pass a standard deviation',
      )
    }
    const out = new Float32Array(length)
    for (let i = 0; i < length; i += batch) {
      const count = Math.min(batch, length - i)
      const words = this.#draw(count)
      for (let j = 0; j < count; j += 2) {
        const radius = std * sqrt(-2 * logFraction(words[j]))
        turn(words[j + 1], onCircle)
        out[i + j] = radius * onCircle[0]
        if (j + 1 < count) out[i + j + 1] = radius * onCircle[1]
      }
    }
    return out
  }

  /** Shuffles an array in place (Fisher-Yates) and returns it. @throws MoeError E_ATTR if it is not an array */
  shuffle<T extends { [index: number]: number | unknown; length: number }>(items: T): T {
    if (typeof items !== 'object' || !isSize(items?.length ?? -1)) {
      throw attrError('Random.shuffle', `the items are ${describe(items)}`, 'pass an array')
    }
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.integer(i + 1)
      const swap = items[i]
      items[i] = items[j]
      items[j] = swap
    }
    return items
  }
}

const powers = Float64Array.from({ length: 34 }, (_, e) => 2 ** -e)

/**
 * ln((word + 1) / (2^32 + 1)) to within 1e-14. Like `turn`, it uses only additions and multiplications: three times as
 * fast as Math.log, Math.cos and Math.sin, and the same bits in every engine.
 */
function logFraction(word: number): number {
  const x = word + 1
  let exponent = x === 4294967296 ? 32 : 31 - clz32(x)
  let m = x * powers[exponent]
  if (m > SQRT2) {
    m *= 0.5
    exponent++
  }
  // ln m = 2 artanh s
  const s = (m - 1) / (m + 1)
  const z = s * s
  const tail = 1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15 + z * (1 / 17))))
  return 2 * s * (1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * tail)))) + exponent * LN2 - 22.18070977815108
}

const onCircle = new Float64Array(2)

/**
 * Cosine and sine of word / 2^32 of a full turn, to within 1e-15: from the nearest quarter turn and a remainder of at
 * most an eighth.
 */
function turn(word: number, out: Float64Array): void {
  const quarter = (word + 536870912) >>> 30
  const t = ((word - (quarter << 30)) | 0) * 1.4629180792671596e-9
  const z = t * t
  const s =
    t *
    (1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880 + z * (-1 / 39916800 + z * (1 / 6227020800)))))))
  const c =
    1 +
    z *
      (-1 / 2 +
        z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800 + z * (1 / 479001600 - z / 87178291200))))))
  const swapped = (quarter & 1) === 1
  const x = swapped ? s : c
  const y = swapped ? c : s
  out[0] = quarter === 1 || quarter === 2 ? -x : x
  out[1] = quarter >= 2 ? -y : y
}
