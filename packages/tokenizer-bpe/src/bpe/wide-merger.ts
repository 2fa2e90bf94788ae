/**
 * @file Long pieces of characters of three bytes (CJK, kana, Hangul), straight from characters to tokens: parts of one or two characters between
 * borders that no token lies across, which most Chinese words are. Such a part is the tokens of its characters, which are looked up, or the
 * one token that they merge to. That holds where no token begins or ends inside a character and crosses the border between the two: then
 * nothing crosses it before both characters are one token each. Random words cost hardly more here than words that were seen before.
 */
import { codePointAt } from '../unicode/utf8.ts'
import { type CutTable, hasBit, hashPair, PAIR_BITS } from './cut-table.ts'
import type { PieceMerger } from './merge-piece.ts'
import { NO_RANK } from './merge-table.ts'

const CACHE_BITS = 16

export class WideMerger {
  readonly #merger: PieceMerger
  readonly #cuts: CutTable
  /** For each character: its token + 1; or minus the place of its tokens in the list, which start with their number; 0 when not known yet. */
  readonly #tokens = new Int32Array(0x10000)
  readonly #lists: number[] = [0]
  readonly #bytes = new Uint8Array(3)
  /** Two characters, and the token that they make together + 1 or 0, at their hash; the last pair that came stays. */
  readonly #cache = new Int32Array(2 << CACHE_BITS)
  /** Where the last call of `merge` stopped. */
  end = 0

  constructor(merger: PieceMerger, cuts: CutTable) {
    this.#merger = merger
    this.#cuts = cuts
  }

  /**
   * Writes the tokens of the parts of one or two characters from `at` on, a border, at `ids[length]`, and returns the new length. Stops where another
   * part begins, or the piece ends.
   */
  merge(bytes: Uint8Array, at: number, end: number, ids: Uint32Array, length: number): number {
    const { pairs, joined } = this.#cuts
    const tokens = this.#tokens
    const cache = this.#cache
    while (at < end && (bytes[at] & 0xf0) === 0xe0) {
      const x = ((bytes[at] & 0x0f) << 12) | ((bytes[at + 1] & 0x3f) << 6) | (bytes[at + 2] & 0x3f)
      const token = tokens[x] || this.#find(x)
      const border = at + 3
      let hash = 0
      if (border < end) {
        const lead = bytes[border]
        if (hasBit(joined, (bytes[border - 1] << 8) | lead)) break
        const y = codePointAt(bytes, border)
        hash = hashPair(x, y)
        if (hasBit(pairs, hash)) {
          if ((lead & 0xf0) !== 0xe0) break
          const next = border + 3
          if (next < end) {
            if (hasBit(joined, (bytes[next - 1] << 8) | bytes[next])) break
            if (hasBit(pairs, hashPair(y, codePointAt(bytes, next)))) break
          }
          const slot = (hash >>> (PAIR_BITS - CACHE_BITS)) << 1
          const key = (x << 16) | y
          const made = cache[slot] === key ? cache[slot + 1] : this.#pair(x, y, slot)
          if (made !== 0) ids[length++] = made - 1
          else {
            length = this.#put(token, ids, length)
            length = this.#put(tokens[y], ids, length)
          }
          at = next
          continue
        }
      }
      length = this.#put(token, ids, length)
      at = border
    }
    this.end = at
    return length
  }

  #pair(x: number, y: number, slot: number): number {
    const left = this.#tokens[x] || this.#find(x)
    const right = this.#tokens[y] || this.#find(y)
    const { table } = this.#merger
    const rank = left > 0 && right > 0 ? table.rank(left - 1, right - 1) : NO_RANK
    const made = rank === NO_RANK ? 0 : table.product[rank] + 1
    this.#cache[slot] = (x << 16) | y
    this.#cache[slot + 1] = made
    return made
  }

  #put(token: number, out: Uint32Array, at: number): number {
    if (token > 0) {
      out[at] = token - 1
      return at + 1
    }
    const list = this.#lists
    for (let i = 1; i <= list[-token]; i++) out[at++] = list[i - token]
    return at
  }

  #find(char: number): number {
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
