/** @file The hot loop: bytes of a text between added tokens in, ids out, through the scanner, the cache and the merges. */
import type { Scanner } from '../scan/scanner.ts'
import type { PieceMerger } from './merge-piece.ts'
import { hashBytes, hashKey, KEY_MASKS, LONG_KEY, PieceCache, SHORT_KEY, SLOT } from './piece-cache.ts'

/** Zero bytes that must be readable past the end of a text, so that keys load in whole words. */
export const PADDING = 16

/** Ids with room to grow. */
export class IdBuffer {
  ids: Uint32Array = new Uint32Array(256)
  length = 0

  /** Makes room for `count` more. */
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

/** Called for each piece with its place in the bytes and the number of ids that it gave. */
export type PieceListener = (start: number, end: number, ids: number) => void

export class Encoder {
  readonly #merger: PieceMerger
  readonly #scan: Scanner
  /** Id of a piece that is a token as a whole, or -1; asked before merging. */
  readonly #whole: ((bytes: Uint8Array, start: number, end: number) => number) | undefined
  readonly #cache = new PieceCache()
  readonly #ends = new Int32Array(4096)

  constructor(
    merger: PieceMerger,
    scan: Scanner,
    whole: ((bytes: Uint8Array, start: number, end: number) => number) | undefined,
  ) {
    this.#merger = merger
    this.#scan = scan
    this.#whole = whole
  }

  /** Appends the ids of `bytes[start..end)`; `view` is over the same bytes, which are readable for PADDING more. */
  encode(bytes: Uint8Array, view: DataView, start: number, end: number, out: IdBuffer, listener?: PieceListener): void {
    const scan = this.#scan
    const ends = this.#ends
    const masks = KEY_MASKS
    const cache = this.#cache
    let pos = start
    while (pos < end) {
      const count = scan(bytes, pos, end, ends)
      const last = ends[count - 1]
      out.reserve(last - pos + 3)
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
          const hash = hashKey(k0, k1, k2, k3, width)
          const limit = slots.length - 1
          let slot = (hash >>> shift) * SLOT
          let probes = 8
          let meta = slots[slot + 4]
          while (meta !== 0) {
            if (
              (meta & 0xff) === width &&
              slots[slot] === k0 &&
              slots[slot + 1] === k1 &&
              slots[slot + 2] === k2 &&
              slots[slot + 3] === k3
            ) {
              break
            }
            if (--probes === 0) {
              meta = 0
              break
            }
            slot = (slot + SLOT) & limit
            meta = slots[slot + 4]
          }
          if (meta !== 0) {
            const tokens = meta >>> 8
            if (tokens <= 3) {
              // Writing three and keeping some costs less than a loop; room is reserved for it.
              ids[length] = slots[slot + 5]
              if (tokens > 1) {
                ids[length + 1] = slots[slot + 6]
                ids[length + 2] = slots[slot + 7]
              }
              length += tokens
            } else {
              const pool = cache.pool
              const place = slots[slot + 5]
              for (let t = 0; t < tokens; t++) ids[length + t] = pool[place + t]
              length += tokens
            }
          } else {
            const tokens = this.#merge(bytes, from, pos)
            const made = this.#merger.out
            for (let t = 0; t < tokens; t++) ids[length + t] = made[t]
            length += tokens
            cache.put(k0, k1, k2, k3, hash, width, made, tokens)
            slots = cache.slots
            shift = 32 - cache.bits
          }
        } else if (width <= LONG_KEY) {
          const hash = hashBytes(bytes, from, width)
          const place = cache.findLong(bytes, from, width, hash)
          if (place >= 0) {
            const pool = cache.pool
            const tokens = cache.found
            for (let t = 0; t < tokens; t++) ids[length + t] = pool[place + t]
            length += tokens
          } else {
            const tokens = this.#merge(bytes, from, pos)
            const made = this.#merger.out
            for (let t = 0; t < tokens; t++) ids[length + t] = made[t]
            length += tokens
            cache.putLong(bytes, from, width, hash, made, tokens)
            slots = cache.slots
          }
        } else {
          const tokens = this.#merge(bytes, from, pos)
          ids.set(this.#merger.out.subarray(0, tokens), length)
          length += tokens
        }
        if (listener !== undefined) {
          out.length = length
          listener(from, pos, length - before)
        }
      }
      out.length = length
    }
  }

  #merge(bytes: Uint8Array, start: number, end: number): number {
    if (this.#whole !== undefined) {
      const id = this.#whole(bytes, start, end)
      if (id >= 0) {
        this.#merger.out[0] = id
        return 1
      }
    }
    return this.#merger.merge(bytes, start, end)
  }
}
