/**
 * @file Tokens of longer pieces that were seen before: clauses of a script without spaces, long words. A bounded table of hashes, and the pieces with
 * their tokens in one pool; both grow, and begin anew where they are full. A piece is kept when it comes for the second time: most never
 * do, and writing them all down took a quarter of the time of a new text.
 */
import { hasBit, setBit } from './cut-table.ts'
import { KEY_MASKS, PROBES } from './piece-cache.ts'

/** Longest piece that is kept, in bytes. */
export const LONG_KEY = 252

const MIN_BITS = 8
const MAX_BITS = 17
const MAX_POOL = 1 << 21
const MET_BITS = 20
/** Pieces that are remembered to have come once. */
const MAX_MET = 1 << 17

export class LongPieceCache {
  /** hash, place in the pool + 1 */
  #slots = new Int32Array(2 << MIN_BITS)
  #bits = MIN_BITS
  #used = 0
  /** Of each piece: `tokens << 8 | length`, its bytes in words, its tokens. */
  pool: Int32Array = new Int32Array(1 << 12)
  #poolUsed = 0
  /** A bit at the hash of each piece that came. */
  readonly #met = new Uint8Array(1 << (MET_BITS - 3))
  #metCount = 0
  /** Number of tokens of the piece that was found last. */
  found = 0

  /** Place in `pool` of the tokens of a piece, or -1. */
  find(view: DataView, start: number, length: number, hash: number): number {
    const slots = this.#slots
    const pool = this.pool
    const mask = (1 << this.#bits) - 1
    const words = length >> 2
    for (let probe = 0, at = hash >>> (32 - this.#bits); probe < PROBES; probe++, at = (at + 1) & mask) {
      const place = slots[at * 2 + 1]
      if (place === 0) break
      if (slots[at * 2] !== hash || (pool[place - 1] & 0xff) !== length) continue
      let i = 0
      while (i < words && pool[place + i] === view.getInt32(start + i * 4, true)) i++
      if (i < words || pool[place + i] !== lastWord(view, start, length)) continue
      this.found = pool[place - 1] >>> 8
      return place + words + 1
    }
    return -1
  }

  /** Keeps `ids[from..to)` as the tokens of a piece that was not found, if it was here before. */
  put(
    view: DataView,
    start: number,
    length: number,
    hash: number,
    ids: ArrayLike<number>,
    from: number,
    to: number,
  ): void {
    const bit = hash >>> (32 - MET_BITS)
    if (!hasBit(this.#met, bit)) {
      if (this.#metCount++ === MAX_MET) {
        this.#met.fill(0)
        this.#metCount = 1
      }
      setBit(this.#met, bit)
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
    const place = this.#poolUsed
    if (!this.#enter(hash, place + 1)) return
    let at = place
    pool[at++] = ((to - from) << 8) | length
    for (let i = 0; i < words; i++) pool[at++] = view.getInt32(start + i * 4, true)
    pool[at++] = lastWord(view, start, length)
    for (let i = from; i < to; i++) pool[at++] = ids[i]
    this.#poolUsed = at
  }

  #enter(hash: number, place: number): boolean {
    const mask = (1 << this.#bits) - 1
    for (let probe = 0, at = hash >>> (32 - this.#bits); probe < PROBES; probe++, at = (at + 1) & mask) {
      if (this.#slots[at * 2 + 1] !== 0) continue
      this.#slots[at * 2] = hash
      this.#slots[at * 2 + 1] = place
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
    for (let i = 0; i < old.length; i += 2) if (old[i + 1] !== 0) this.#enter(old[i], old[i + 1])
  }

  #clear(): void {
    this.#slots.fill(0)
    this.#used = 0
    this.#poolUsed = 0
  }
}

/** The up to three bytes after the last whole word. */
function lastWord(view: DataView, start: number, length: number): number {
  return view.getInt32(start + (length & ~3), true) & KEY_MASKS[(length & 3) << 2]
}

/** 32-bit hash of a piece; `mark` tells apart what has other tokens in spite of the same bytes. */
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
