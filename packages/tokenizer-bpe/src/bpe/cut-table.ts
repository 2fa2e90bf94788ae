/**
 * @file Where a long piece falls apart: borders between two bytes that no token of the vocabulary can lie across, whatever the merges do. Each part is
 * then merged (and remembered) by itself, which keeps long words, CJK runs and hostile input in the fast, small cases.
 *
 * A token across the border w x | y z either is `xy`, or begins `xyz` (one byte before the border), or ends `wxy` (one byte after), or
 * contains `wxyz`. Where none of these occurs, nothing crosses. The sets are bits at hashes: a false hit only leaves a border uncut.
 */

const BITS = 20
const MASK = (1 << BITS) - 1

export class CutTable {
  readonly #pairs = new Uint8Array(65536 >> 3)
  readonly #begins = new Uint8Array((MASK + 1) >> 3)
  readonly #ends = new Uint8Array((MASK + 1) >> 3)
  readonly #inside = new Uint8Array((MASK + 1) >> 1)

  /** @param bytes, starts, lengths the bytes of all tokens, token i at `starts[i]` */
  constructor(bytes: Uint8Array, starts: Int32Array, lengths: Int32Array) {
    for (let token = 0; token < starts.length; token++) {
      const start = starts[token]
      const end = start + lengths[token]
      if (end - start === 2) set(this.#pairs, (bytes[start] << 8) | bytes[start + 1])
      if (end - start < 3) continue
      set(this.#begins, hash3(bytes[start], bytes[start + 1], bytes[start + 2]))
      set(this.#ends, hash3(bytes[end - 3], bytes[end - 2], bytes[end - 1]))
      for (let at = start; at + 4 <= end; at++) {
        set(this.#inside, hash4(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]))
      }
    }
  }

  /** The first border of characters after `at` in the piece `bytes[start..end)` that nothing crosses, or `end`. */
  next(bytes: Uint8Array, start: number, at: number, end: number): number {
    for (let border = at + 1; border < end; border++) {
      const y = bytes[border]
      if ((y & 0xc0) === 0x80) continue
      const x = bytes[border - 1]
      if (has(this.#pairs, (x << 8) | y)) continue
      const before = border - 2 >= start
      const after = border + 1 < end
      if (after && has(this.#begins, hash3(x, y, bytes[border + 1]))) continue
      if (before && has(this.#ends, hash3(bytes[border - 2], x, y))) continue
      if (before && after && has(this.#inside, hash4(bytes[border - 2], x, y, bytes[border + 1]))) continue
      return border
    }
    return end
  }
}

function set(bits: Uint8Array, index: number): void {
  bits[index >>> 3] |= 1 << (index & 7)
}

function has(bits: Uint8Array, index: number): boolean {
  return (bits[index >>> 3] & (1 << (index & 7))) !== 0
}

function hash3(a: number, b: number, c: number): number {
  return Math.imul((a << 16) | (b << 8) | c, 0x9e3779b1) >>> (32 - BITS)
}

function hash4(a: number, b: number, c: number, d: number): number {
  return Math.imul((a << 24) | (b << 16) | (c << 8) | d, 0x9e3779b1) >>> (32 - BITS - 2)
}
