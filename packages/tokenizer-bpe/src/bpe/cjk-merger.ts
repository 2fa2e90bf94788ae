/**
 * @file A fast path for long pieces of three-byte characters (CJK, kana, Hangul). Between boundaries that no token
 * crosses, most parts of Chinese text are one or two characters. Such a part consists of the tokens of its characters,
 * which are looked up, or of the one token that they merge to. This holds if no token with incomplete characters
 * crosses the boundary between the two, since both characters are then complete tokens before anything crosses it. New
 * words are hardly slower than cached ones.
 */
import { codePointAt } from '../unicode/utf8.ts'
import { type BoundaryTable, hasBit, hashPair, PAIR_BITS } from './boundary-table.ts'
import { NO_RANK } from './merge-table.ts'
import type { PieceMerger } from './piece-merger.ts'

const CACHE_BITS = 16

export class CjkMerger {
  readonly #merger: PieceMerger
  readonly #boundaries: BoundaryTable
  /**
   * For each character: its token + 1; minus the index of its tokens in `#lists`, where their number comes first; or 0
   * if unknown.
   */
  readonly #tokens = new Int32Array(0x10000)
  readonly #lists: number[] = [0]
  readonly #bytes = new Uint8Array(3)
  /**
   * At the hash of two characters: both, and the token + 1 that they merge to, or 0. The latest pair overwrites others.
   */
  readonly #cache = new Int32Array(2 << CACHE_BITS)
  /** Position at which the last call of `merge` stopped. */
  end = 0

  constructor(merger: PieceMerger, boundaries: BoundaryTable) {
    this.#merger = merger
    this.#boundaries = boundaries
  }

  /**
   * Writes the tokens of parts of one or two characters to `ids`, starting at index `length`, and returns the new
   * length. Starts at `at`, which must be a boundary, and stops at the first other part or at the end of the piece.
   */
  merge(bytes: Uint8Array, at: number, end: number, ids: Uint32Array, length: number): number {
    const { pairs, unsplittable } = this.#boundaries
    const tokens = this.#tokens
    const cache = this.#cache
    while (at < end && (bytes[at] & 0xf0) === 0xe0) {
      const x = ((bytes[at] & 0x0f) << 12) | ((bytes[at + 1] & 0x3f) << 6) | (bytes[at + 2] & 0x3f)
      const token = tokens[x] || this.#tokensOf(x)
      const boundary = at + 3
      let hash = 0
      if (boundary < end) {
        const lead = bytes[boundary]
        if (hasBit(unsplittable, (bytes[boundary - 1] << 8) | lead)) break
        const y = codePointAt(bytes, boundary)
        hash = hashPair(x, y)
        if (hasBit(pairs, hash)) {
          if ((lead & 0xf0) !== 0xe0) break
          const next = boundary + 3
          if (next < end) {
            if (hasBit(unsplittable, (bytes[next - 1] << 8) | bytes[next])) break
            if (hasBit(pairs, hashPair(y, codePointAt(bytes, next)))) break
          }
          const slot = (hash >>> (PAIR_BITS - CACHE_BITS)) << 1
          const key = (x << 16) | y
          const merged = cache[slot] === key ? cache[slot + 1] : this.#pair(x, y, slot)
          if (merged !== 0) ids[length++] = merged - 1
          else {
            length = this.#put(token, ids, length)
            length = this.#put(tokens[y], ids, length)
          }
          at = next
          continue
        }
      }
      length = this.#put(token, ids, length)
      at = boundary
    }
    this.end = at
    return length
  }

  /** Looks up the token + 1 that two characters merge to, or 0, and caches it. */
  #pair(x: number, y: number, slot: number): number {
    const left = this.#tokens[x] || this.#tokensOf(x)
    const right = this.#tokens[y] || this.#tokensOf(y)
    const { table } = this.#merger
    const rank = left > 0 && right > 0 ? table.rank(left - 1, right - 1) : NO_RANK
    const merged = rank === NO_RANK ? 0 : table.product[rank] + 1
    this.#cache[slot] = (x << 16) | y
    this.#cache[slot + 1] = merged
    return merged
  }

  /** Writes the tokens of a character. */
  #put(token: number, out: Uint32Array, at: number): number {
    if (token > 0) {
      out[at] = token - 1
      return at + 1
    }
    const list = this.#lists
    for (let i = 1; i <= list[-token]; i++) out[at++] = list[i - token]
    return at
  }

  /** Merges a character, and keeps the result. */
  #tokensOf(char: number): number {
    const bytes = this.#bytes
    bytes[0] = 0xe0 | (char >> 12)
    bytes[1] = 0x80 | ((char >> 6) & 0x3f)
    bytes[2] = 0x80 | (char & 0x3f)
    const merger = this.#merger
    const count = merger.merge(bytes, 0, 3)
    const { out } = merger
    let token = out[0] + 1
    if (count > 1) {
      token = -this.#lists.length
      this.#lists.push(count, ...out.subarray(0, count))
    }
    this.#tokens[char] = token
    return token
  }
}
