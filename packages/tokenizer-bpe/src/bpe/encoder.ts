/**
 * @file The hot loop of encoding: splits bytes into pieces, and converts these to ids with the caches and the merger.
 */
import type { Scanner } from '../scan/scanner.ts'
import type { BoundaryTable } from './boundary-table.ts'
import { CjkMerger } from './cjk-merger.ts'
import { hashLong, LONG_KEY, LongPieceCache } from './long-piece-cache.ts'
import { hashKey, KEY_MASKS, PieceCache, PROBES, SHORT_KEY, SLOT } from './piece-cache.ts'
import type { PieceMerger } from './piece-merger.ts'
import type { TokenLookup } from './token-lookup.ts'

/** Number of bytes that must be readable after the end of a text, so that keys can be loaded in words. */
export const PADDING = 16

/** A growing list of ids. */
export class IdBuffer {
  ids: Uint32Array = new Uint32Array(256)
  length = 0

  /** Reserves space for `count` more ids. */
  reserve(count: number): void {
    const need = this.length + count
    if (need <= this.ids.length) return
    const grown = new Uint32Array(Math.max(need, this.ids.length * 2))
    grown.set(this.ids.subarray(0, this.length))
    this.ids = grown
  }

  push(id: number): void {
    this.reserve(1)
    this.ids[this.length++] = id
  }
}

/** Called for each piece with its position and the number of its ids, which are the last ones in the buffer. */
export type PieceListener = (start: number, end: number, ids: number) => void

/** Flag in the key of a part of a piece. Unlike a piece, a part is merged even if it is a token (`ignore_merges`). */
const PART = 0x20

export class Encoder {
  readonly #merger: PieceMerger
  readonly #scan: Scanner
  readonly #lookup: TokenLookup | undefined
  readonly #makeBoundaries: () => BoundaryTable
  #boundaries: BoundaryTable | undefined
  #cjk: CjkMerger | undefined
  readonly #cache = new PieceCache()
  readonly #longCache = new LongPieceCache()
  readonly #ends = new Int32Array(4096)

  /**
   * @param lookup for `ignore_merges`: pieces found in it are not merged
   * @param makeBoundaries called for the first long piece
   */
  constructor(
    merger: PieceMerger,
    scan: Scanner,
    lookup: TokenLookup | undefined,
    makeBoundaries: () => BoundaryTable,
  ) {
    this.#merger = merger
    this.#scan = scan
    this.#lookup = lookup
    this.#makeBoundaries = makeBoundaries
  }

  /** Appends the ids of `bytes[start..end)`. `view` covers the same bytes, and PADDING bytes after them. */
  encode(bytes: Uint8Array, view: DataView, start: number, end: number, out: IdBuffer, listener?: PieceListener): void {
    const scan = this.#scan
    const ends = this.#ends
    const masks = KEY_MASKS
    const cache = this.#cache
    let pos = start
    while (pos < end) {
      const count = scan(bytes, pos, end, ends)
      // At most one id per byte; up to three are written even if there is only one.
      out.reserve(ends[count - 1] - pos + 3)
      const ids = out.ids
      let length = out.length
      let slots = cache.slots
      let shift = 32 - cache.bits
      for (let i = 0; i < count; i++) {
        const from = pos
        pos = ends[i]
        const width = pos - from
        const before = length
        if (width <= SHORT_KEY) {
          const row = width << 2
          const k0 = view.getInt32(from, true) & masks[row]
          const k1 = view.getInt32(from + 4, true) & masks[row + 1]
          const k2 = view.getInt32(from + 8, true) & masks[row + 2]
          const k3 = view.getInt32(from + 12, true) & masks[row + 3]
          const slot = (hashKey(k0, k1, k2, k3, width) >>> shift) * SLOT
          const meta = slots[slot + 4]
          if (
            (meta & 0xff) === width &&
            slots[slot] === k0 &&
            slots[slot + 1] === k1 &&
            slots[slot + 2] === k2 &&
            slots[slot + 3] === k3 &&
            meta < 0x400
          ) {
            // The usual case: found in its first slot, with at most three ids.
            ids[length] = slots[slot + 5]
            if (meta >= 0x200) {
              ids[length + 1] = slots[slot + 6]
              ids[length + 2] = slots[slot + 7]
            }
            length += meta >>> 8
          } else {
            length = this.#short(bytes, view, from, pos, width, ids, length)
            slots = cache.slots
            shift = 32 - cache.bits
          }
        } else {
          length = this.#long(bytes, view, from, pos, 0, ids, length)
          slots = cache.slots
          shift = 32 - cache.bits
        }
        if (listener !== undefined) {
          out.length = length
          listener(from, pos, length - before)
        }
      }
      out.length = length
    }
  }

  /**
   * Encodes a piece or part of up to SHORT_KEY bytes, with the cache. `mark` is its length, with the flag PART for a
   * part.
   */
  #short(
    bytes: Uint8Array,
    view: DataView,
    from: number,
    to: number,
    mark: number,
    ids: Uint32Array,
    length: number,
  ): number {
    const cache = this.#cache
    const row = (to - from) << 2
    const k0 = view.getInt32(from, true) & KEY_MASKS[row]
    const k1 = view.getInt32(from + 4, true) & KEY_MASKS[row + 1]
    const k2 = view.getInt32(from + 8, true) & KEY_MASKS[row + 2]
    const k3 = view.getInt32(from + 12, true) & KEY_MASKS[row + 3]
    const hash = hashKey(k0, k1, k2, k3, mark)
    const slots = cache.slots
    const limit = slots.length - 1
    let slot = (hash >>> (32 - cache.bits)) * SLOT
    for (let probe = 0; probe < PROBES; probe++) {
      const meta = slots[slot + 4]
      if (meta === 0) break
      if (
        (meta & 0xff) === mark &&
        slots[slot] === k0 &&
        slots[slot + 1] === k1 &&
        slots[slot + 2] === k2 &&
        slots[slot + 3] === k3
      ) {
        const tokens = meta >>> 8
        if (tokens <= 3) for (let t = 0; t < tokens; t++) ids[length + t] = slots[slot + 5 + t]
        else for (let t = 0; t < tokens; t++) ids[length + t] = cache.pool[slots[slot + 5] + t]
        return length + tokens
      }
      slot = (slot + SLOT) & limit
    }
    const whole = mark < PART && this.#lookup !== undefined ? this.#lookup.find(bytes, from, to) : -1
    let tokens = 1
    if (whole >= 0) this.#merger.out[0] = whole
    else tokens = this.#merger.merge(bytes, from, to)
    const merged = this.#merger.out
    for (let t = 0; t < tokens; t++) ids[length + t] = merged[t]
    cache.put(k0, k1, k2, k3, hash, mark, merged, tokens)
    return length + tokens
  }

  /** Encodes a longer piece, or part of one if `mark` is PART, with the cache. */
  #long(
    bytes: Uint8Array,
    view: DataView,
    from: number,
    to: number,
    mark: number,
    ids: Uint32Array,
    length: number,
  ): number {
    const width = to - from
    const cache = this.#longCache
    const cached = width <= LONG_KEY
    let hash = 0
    if (cached) {
      hash = hashLong(view, from, width, mark)
      const at = cache.find(view, from, width, hash)
      if (at >= 0) {
        const { pool, found } = cache
        for (let i = 0; i < found; i++) ids[length + i] = pool[at + i]
        return length + found
      }
    }
    const end =
      mark === PART ? this.#merge(bytes, from, to, ids, length) : this.#split(bytes, view, from, to, ids, length)
    if (cached) cache.put(view, from, width, hash, ids, length, end)
    return end
  }

  /** Encodes a longer piece in parts between boundaries that no token crosses. */
  #split(bytes: Uint8Array, view: DataView, from: number, to: number, ids: Uint32Array, length: number): number {
    if (this.#lookup !== undefined) {
      const whole = this.#lookup.find(bytes, from, to)
      if (whole >= 0) {
        ids[length] = whole
        return length + 1
      }
    }
    // Without a token for every byte, boundaries are not reliable: dropped bytes make others adjacent.
    if (!this.#merger.complete) return this.#merge(bytes, from, to, ids, length)
    this.#boundaries ??= this.#makeBoundaries()
    const boundaries = this.#boundaries
    this.#cjk ??= new CjkMerger(this.#merger, boundaries)
    const cjk = this.#cjk
    const mark = this.#lookup === undefined ? 0 : PART
    for (let at = from; at < to; ) {
      if (bytes[at] >= 0xe0) {
        length = cjk.merge(bytes, at, to, ids, length)
        at = cjk.end
        if (at === to) break
      }
      const next = boundaries.next(bytes, at, to)
      const width = next - at
      if (width <= SHORT_KEY) length = this.#short(bytes, view, at, next, width | mark, ids, length)
      else if (width === to - from) length = this.#merge(bytes, at, next, ids, length)
      else length = this.#long(bytes, view, at, next, PART, ids, length)
      at = next
    }
    return length
  }

  #merge(bytes: Uint8Array, from: number, to: number, ids: Uint32Array, length: number): number {
    const tokens = this.#merger.merge(bytes, from, to)
    const { out } = this.#merger
    for (let i = 0; i < tokens; i++) ids[length + i] = out[i]
    return length + tokens
  }
}
