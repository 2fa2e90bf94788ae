/**
 * @file Where a long piece can be split: boundaries between two characters that no token of the vocabulary crosses. The
 * parts are merged and cached separately, so that long words, CJK runs and malicious input become short, fast cases.
 *
 * A token that crosses the boundary between x and y in w x | y z contains the pair xy. For most Chinese words that
 * rules out all tokens. In scripts where nearly every pair of letters is in some token, the neighbours are checked too:
 * a token that crosses is `xy`, starts with `xyz`, ends with `wxy`, or contains `wxyz`. The sets are bits at hashes; a
 * collision only leaves a boundary unused. For tokens that contain incomplete characters, the two bytes around each
 * character boundary in them are recorded instead.
 */
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const NONE = -1
export const PAIR_BITS = 20
const LONGER_BITS = 22
const ASCII = 0x80
/** The first character of three bytes. Pairs of such characters are selective enough without their neighbours. */
const WIDE = 0x800

export class BoundaryTable {
  readonly #bytes: Uint8Array
  readonly #starts: Int32Array
  readonly #lengths: Int32Array
  /** Pairs of adjacent characters in tokens. Pairs of ASCII characters are omitted, since nearly all occur. */
  readonly pairs: Uint8Array = new Uint8Array(1 << (PAIR_BITS - 3))
  /**
   * Pairs of bytes between which a piece is never split: those at character boundaries in tokens that contain
   * incomplete characters, and, to answer quickly, tokens of two ASCII characters.
   */
  readonly unsplittable: Uint8Array = new Uint8Array(65536 >> 3)
  /** `xy`, `xyz`, `wxy` and `wxyz` as above, with NONE where the token ends; built on first use. */
  #contexts: Uint8Array | undefined

  /** @param bytes, starts, lengths bytes of all tokens; token i is `lengths[i]` bytes at `starts[i]` */
  constructor(bytes: Uint8Array, starts: Int32Array, lengths: Int32Array) {
    this.#bytes = bytes
    this.#starts = starts
    this.#lengths = lengths
    for (let token = 0; token < starts.length; token++) {
      const start = starts[token]
      const end = start + lengths[token]
      if (end - start === 2 && bytes[start] < ASCII && bytes[start + 1] < ASCII) {
        setBit(this.unsplittable, (bytes[start] << 8) | bytes[start + 1])
      } else if (isWhole(bytes, start, end)) {
        let x = NONE
        for (let at = start; at < end; at += widthOf(bytes[at])) {
          const y = codePointAt(bytes, at)
          if (x >= ASCII || (x !== NONE && y >= ASCII)) setBit(this.pairs, hashPair(x, y))
          x = y
        }
      } else {
        for (let at = start + 1; at < end; at++) {
          if ((bytes[at] & 0xc0) !== 0x80) setBit(this.unsplittable, (bytes[at - 1] << 8) | bytes[at])
        }
      }
    }
  }

  /**
   * Returns the next boundary after `at` that no token crosses, or `end`, the end of the piece. `at` must be one, too.
   */
  next(bytes: Uint8Array, at: number, end: number): number {
    let w = NONE
    let x = codePointAt(bytes, at)
    let boundary = at + widthOf(bytes[at])
    while (boundary < end) {
      const y = codePointAt(bytes, boundary)
      const after = boundary + widthOf(bytes[boundary])
      if (!hasBit(this.unsplittable, (bytes[boundary - 1] << 8) | bytes[boundary])) {
        if ((x >= ASCII || y >= ASCII) && !hasBit(this.pairs, hashPair(x, y))) break
        if ((x < WIDE || y < WIDE) && !this.#isCrossed(w, x, y, after < end ? codePointAt(bytes, after) : NONE)) break
      }
      w = x
      x = y
      boundary = after
    }
    return boundary
  }

  #isCrossed(w: number, x: number, y: number, z: number): boolean {
    this.#contexts ??= this.#buildContexts()
    const contexts = this.#contexts
    return (
      hasBit(contexts, hashFour(NONE, x, y, NONE)) ||
      (z !== NONE && hasBit(contexts, hashFour(NONE, x, y, z))) ||
      (w !== NONE && hasBit(contexts, hashFour(w, x, y, NONE))) ||
      (w !== NONE && z !== NONE && hasBit(contexts, hashFour(w, x, y, z)))
    )
  }

  #buildContexts(): Uint8Array {
    const contexts = new Uint8Array(1 << (LONGER_BITS - 3))
    const bytes = this.#bytes
    for (let token = 0; token < this.#starts.length; token++) {
      const start = this.#starts[token]
      const end = start + this.#lengths[token]
      if (!isWhole(bytes, start, end)) continue
      let w = NONE
      let x = NONE
      let y = NONE
      for (let at = start; at < end || y !== NONE; ) {
        const z = at < end ? codePointAt(bytes, at) : NONE
        if (x !== NONE && (x < WIDE || y < WIDE)) setBit(contexts, hashFour(w, x, y, z))
        w = x
        x = y
        y = z
        if (at < end) at += widthOf(bytes[at])
      }
    }
    return contexts
  }
}

/** Whether the bytes are complete characters. */
function isWhole(bytes: Uint8Array, start: number, end: number): boolean {
  let at = start
  while (at < end) {
    if ((bytes[at] & 0xc0) === 0x80) return false
    const next = at + widthOf(bytes[at])
    while (++at < next) if (at >= end || (bytes[at] & 0xc0) !== 0x80) return false
  }
  return true
}

export function setBit(bits: Uint8Array, index: number): void {
  bits[index >>> 3] |= 1 << (index & 7)
}

export function hasBit(bits: Uint8Array, index: number): boolean {
  return (bits[index >>> 3] & (1 << (index & 7))) !== 0
}

export function hashPair(x: number, y: number): number {
  return (Math.imul(x, 0x9e3779b1) ^ Math.imul(y, 0x85ebca6b)) >>> (32 - PAIR_BITS)
}

function hashFour(w: number, x: number, y: number, z: number): number {
  const h = Math.imul(w, 0xc2b2ae35) ^ Math.imul(x, 0x9e3779b1) ^ Math.imul(y, 0x85ebca6b) ^ Math.imul(z, 0x27d4eb2f)
  return Math.imul(h ^ (h >>> 15), 0x2c1b3c6d) >>> (32 - LONGER_BITS)
}
