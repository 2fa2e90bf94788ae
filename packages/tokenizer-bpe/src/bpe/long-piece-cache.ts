/**
 * @file A cache of the tokens of longer pieces, for example long words or clauses in a script without spaces: a bounded
 * table of hashes, and a pool with the bytes and tokens of each piece. Both grow up to a limit, at which they are
 * cleared. A piece is cached when it occurs for the second time. Most never do, and caching all of them took a quarter
 * of the time for new text.
 */
import { hasBit, setBit } from './boundary-table.ts'
import { KEY_MASKS, PROBES } from './piece-cache.ts'

/** Maximum length of a cached piece in bytes. */
export const LONG_KEY = 252

const MIN_BITS = 8
const MAX_BITS = 17
const MAX_POOL = 1 << 21
const SEEN_BITS = 20
/** Maximum number of pieces that are marked as seen. */
const MAX_SEEN = 1 << 17

export class LongPieceCache {
  /** Hash and index in the pool + 1 of each piece; 0 in free slots. */
  #slots = new Int32Array(2 << MIN_BITS)
  #bits = MIN_BITS
  #used = 0
  /** For each piece: `number of tokens << 8 | length`, its bytes in words, its tokens. */
  pool: Int32Array = new Int32Array(1 << 12)
  #poolUsed = 0
  /** A bit at the hash of each piece that occurred. */
  readonly #seen = new Uint8Array(1 << (SEEN_BITS - 3))
  #seenCount = 0
  /** Number of tokens of the piece that `find` found last. */
  found = 0

  /** Returns the index in `pool` of the tokens of a piece, or -1. */
  find(view: DataView, start: number, length: number, hash: number): number {
    const slots = this.#slots
    const pool = this.pool
    const mask = (1 << this.#bits) - 1
    const words = length >> 2
    for (let probe = 0, at = hash >>> (32 - this.#bits); probe < PROBES; probe++, at = (at + 1) & mask) {
      const index = slots[at * 2 + 1]
      if (index === 0) break
      if (slots[at * 2] !== hash || (pool[index - 1] & 0xff) !== length) continue
      let i = 0
      while (i < words && pool[index + i] === view.getInt32(start + i * 4, true)) i++
      if (i < words || pool[index + i] !== lastWord(view, start, length)) continue
      this.found = pool[index - 1] >>> 8
      return index + words + 1
    }
    return -1
  }

  /** Adds a piece that was not found, with the tokens `ids[from..to)`, if it has occurred before. */
  put(
    view: DataView,
    start: number,
    length: number,
    hash: number,
    ids: ArrayLike<number>,
    from: number,
    to: number,
  ): void {
    const bit = hash >>> (32 - SEEN_BITS)
    if (!hasBit(this.#seen, bit)) {
      if (this.#seenCount++ === MAX_SEEN) {
        this.#seen.fill(0)
        this.#seenCount = 1
      }
      setBit(this.#seen, bit)
      return
    }
    const words = length >> 2
    const need = this.#poolUsed + words + 2 + to - from
    if (need > this.pool.length) {
      if (this.pool.length < MAX_POOL) {
        const grown = new Int32Array(this.pool.length * 2)
        grown.set(this.pool)
        this.pool = grown
      } else this.#clear()
    }
    if (this.#used * 2 >= 1 << this.#bits) {
      if (this.#bits < MAX_BITS) this.#grow()
      else this.#clear()
    }
    const { pool } = this
    const index = this.#poolUsed
    if (!this.#insert(hash, index + 1)) return
    let at = index
    pool[at++] = ((to - from) << 8) | length
    for (let i = 0; i < words; i++) pool[at++] = view.getInt32(start + i * 4, true)
    pool[at++] = lastWord(view, start, length)
    for (let i = from; i < to; i++) pool[at++] = ids[i]
    this.#poolUsed = at
  }

  #insert(hash: number, index: number): boolean {
    const mask = (1 << this.#bits) - 1
    for (let probe = 0, at = hash >>> (32 - this.#bits); probe < PROBES; probe++, at = (at + 1) & mask) {
      if (this.#slots[at * 2 + 1] !== 0) continue
      this.#slots[at * 2] = hash
      this.#slots[at * 2 + 1] = index
      this.#used++
      return true
    }
    return false
  }

  #grow(): void {
    const old = this.#slots
    this.#bits++
    this.#used = 0
    this.#slots = new Int32Array(2 << this.#bits)
    for (let i = 0; i < old.length; i += 2) if (old[i + 1] !== 0) this.#insert(old[i], old[i + 1])
  }

  #clear(): void {
    this.#slots.fill(0)
    this.#used = 0
    this.#poolUsed = 0
  }
}

/** Returns the up to three bytes after the last complete word. */
function lastWord(view: DataView, start: number, length: number): number {
  return view.getInt32(start + (length & ~3), true) & KEY_MASKS[(length & 3) << 2]
}

/** Returns a 32-bit hash of a piece. Different `mark`s distinguish pieces and parts, whose tokens may differ. */
export function hashLong(view: DataView, start: number, length: number, mark: number): number {
  let h = Math.imul(length ^ (mark << 8), 0x9e3779b1)
  const end = start + (length & ~3)
  for (let at = start; at < end; at += 4) {
    h = Math.imul(h ^ view.getInt32(at, true), 0x85ebca6b)
    h ^= h >>> 15
  }
  h = Math.imul(h ^ lastWord(view, start, length), 0xc2b2ae35)
  return h ^ (h >>> 13)
}
