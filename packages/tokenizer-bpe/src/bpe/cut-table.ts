/**
 * @file Where a long piece falls apart: borders between two characters that no token of the vocabulary can lie across, whatever the merges do. Each part
 * is then merged (and remembered) by itself, which keeps long words, CJK runs and hostile input in the fast, small cases.
 *
 * A token across the border w x | y z holds x and y side by side: that alone parts most Chinese words. More closely, it either is `xy`, or begins
 * `xyz`, or ends `wxy`, or contains `wxyz`, which is asked in scripts whose every pair of letters is in some token. The sets are bits at
 * hashes: a false hit only leaves a border uncut. Tokens that hold a part of a character are kept as the two bytes beside their borders.
 */
import { codePointAt, widthOf } from '../unicode/utf8.ts'

const NONE = -1
export const PAIR_BITS = 20
const LONGER_BITS = 22
const ASCII = 0x80
/** First character of three bytes: from here on pairs are told apart well enough. */
const WIDE = 0x800

export class CutTable {
  readonly #bytes: Uint8Array
  readonly #starts: Int32Array
  readonly #lengths: Int32Array
  /** Characters side by side in a token, but for those of ASCII, nearly all of which are. */
  readonly pairs: Uint8Array = new Uint8Array(1 << (PAIR_BITS - 3))
  /** Bytes beside borders that are never cut: those in tokens that begin or end inside a character, and in tokens of two letters, to answer soon. */
  readonly joined: Uint8Array = new Uint8Array(65536 >> 3)
  /** `xy`, `xyz`, `wxy` and `wxyz` as above, NONE where the token ends; made when first asked. */
  #longer: Uint8Array | undefined
  /** @param bytes, starts, lengths the bytes of all tokens, token i at `starts[i]` */
  constructor(bytes: Uint8Array, starts: Int32Array, lengths: Int32Array) {
    this.#bytes = bytes
    this.#starts = starts
    this.#lengths = lengths
    for (let token = 0; token < starts.length; token++) {
      const start = starts[token]
      const end = start + lengths[token]
      if (end - start === 2 && bytes[start] < ASCII && bytes[start + 1] < ASCII) {
        setBit(this.joined, (bytes[start] << 8) | bytes[start + 1])
      } else if (isWhole(bytes, start, end)) {
        let x = NONE
        for (let at = start; at < end; at += widthOf(bytes[at])) {
          const y = codePointAt(bytes, at)
          if (x >= ASCII || (x !== NONE && y >= ASCII)) setBit(this.pairs, hashPair(x, y))
          x = y
        }
      } else {
        for (let at = start + 1; at < end; at++) {
          if ((bytes[at] & 0xc0) !== 0x80) setBit(this.joined, (bytes[at - 1] << 8) | bytes[at])
        }
      }
    }
  }

  /** The next border that nothing crosses after `at`, which is one, in the piece that ends at `end`; or `end`. */
  next(bytes: Uint8Array, at: number, end: number): number {
    let w = NONE
    let x = codePointAt(bytes, at)
    let border = at + widthOf(bytes[at])
    while (border < end) {
      const y = codePointAt(bytes, border)
      const after = border + widthOf(bytes[border])
      if (!hasBit(this.joined, (bytes[border - 1] << 8) | bytes[border])) {
        if ((x >= ASCII || y >= ASCII) && !hasBit(this.pairs, hashPair(x, y))) break
        if ((x < WIDE || y < WIDE) && !this.#isCrossed(w, x, y, after < end ? codePointAt(bytes, after) : NONE)) break
      }
      w = x
      x = y
      border = after
    }
    return border
  }

  #isCrossed(w: number, x: number, y: number, z: number): boolean {
    this.#longer ??= this.#makeLonger()
    const longer = this.#longer
    return (
      hasBit(longer, hashFour(NONE, x, y, NONE)) ||
      (z !== NONE && hasBit(longer, hashFour(NONE, x, y, z))) ||
      (w !== NONE && hasBit(longer, hashFour(w, x, y, NONE))) ||
      (w !== NONE && z !== NONE && hasBit(longer, hashFour(w, x, y, z)))
    )
  }

  #makeLonger(): Uint8Array {
    const longer = new Uint8Array(1 << (LONGER_BITS - 3))
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
        if (x !== NONE && (x < WIDE || y < WIDE)) setBit(longer, hashFour(w, x, y, z))
        w = x
        x = y
        y = z
        if (at < end) at += widthOf(bytes[at])
      }
    }
    return longer
  }
}

/** Whether the bytes are characters from the first to the last. */
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
