/** @file Counts pieces: bytes to a number, in as little memory as the distinct pieces take. */
import { PADDING } from '../bpe/encoder.ts'
import { hashLong } from '../bpe/long-piece-cache.ts'
import { hashKey, KEY_MASKS, SHORT_KEY } from '../bpe/piece-cache.ts'

export class PieceCounter {
  /** Bytes of all distinct pieces, end to end, in order of first appearance; piece i starts at `starts[i]`. */
  bytes: Uint8Array = new Uint8Array(1 << 16)
  starts: Float64Array = new Float64Array(1 << 12)
  counts: Float64Array = new Float64Array(1 << 12)
  size = 0
  /** hash and index + 1 of each piece. */
  #slots = new Int32Array(2 << 13)
  #bits = 13
  #view = new DataView(this.bytes.buffer)

  /** Counts the pieces of `text[start..ends[0])`, `text[ends[0]..ends[1])` and so on. */
  add(text: Uint8Array, view: DataView, start: number, ends: Int32Array, pieces: number): void {
    let pos = start
    for (let i = 0; i < pieces; i++) {
      const from = pos
      pos = ends[i]
      const width = pos - from
      let k0 = 0
      let k1 = 0
      let k2 = 0
      let k3 = 0
      let hash: number
      if (width <= SHORT_KEY) {
        const row = width << 2
        k0 = view.getInt32(from, true) & KEY_MASKS[row]
        k1 = view.getInt32(from + 4, true) & KEY_MASKS[row + 1]
        k2 = view.getInt32(from + 8, true) & KEY_MASKS[row + 2]
        k3 = view.getInt32(from + 12, true) & KEY_MASKS[row + 3]
        hash = hashKey(k0, k1, k2, k3, width)
      } else hash = hashLong(view, from, width, 0)
      const slots = this.#slots
      const mask = slots.length - 1
      let slot = (hash >>> (32 - this.#bits)) * 2
      while (true) {
        const entry = slots[slot + 1]
        if (entry === 0) {
          this.#insert(text, from, width, hash, slot)
          break
        }
        if (slots[slot] === hash) {
          const place = this.starts[entry - 1]
          if (this.starts[entry] - place === width && this.#equal(place, width, text, from, k0, k1, k2, k3)) {
            this.counts[entry - 1]++
            break
          }
        }
        slot = (slot + 2) & mask
      }
    }
  }

  #equal(
    place: number,
    width: number,
    text: Uint8Array,
    from: number,
    k0: number,
    k1: number,
    k2: number,
    k3: number,
  ): boolean {
    if (width <= SHORT_KEY) {
      const view = this.#view
      const row = width << 2
      return (
        (view.getInt32(place, true) & KEY_MASKS[row]) === k0 &&
        (view.getInt32(place + 4, true) & KEY_MASKS[row + 1]) === k1 &&
        (view.getInt32(place + 8, true) & KEY_MASKS[row + 2]) === k2 &&
        (view.getInt32(place + 12, true) & KEY_MASKS[row + 3]) === k3
      )
    }
    const bytes = this.bytes
    for (let i = 0; i < width; i++) if (bytes[place + i] !== text[from + i]) return false
    return true
  }

  #insert(text: Uint8Array, from: number, width: number, hash: number, slot: number): void {
    const index = this.size++
    const place = this.starts[index]
    if (place + width + PADDING > this.bytes.length) {
      const grown = new Uint8Array(Math.max(this.bytes.length * 2, place + width + PADDING))
      grown.set(this.bytes)
      this.bytes = grown
      this.#view = new DataView(grown.buffer)
    }
    this.bytes.set(text.subarray(from, from + width), place)
    if (index + 2 > this.starts.length) {
      this.starts = doubled(this.starts)
      this.counts = doubled(this.counts)
    }
    this.starts[index + 1] = place + width
    this.counts[index] = 1
    this.#slots[slot] = hash
    this.#slots[slot + 1] = index + 1
    if (this.size * 2 > 1 << this.#bits) this.#grow()
  }

  #grow(): void {
    const old = this.#slots
    this.#bits++
    const slots = new Int32Array(2 << this.#bits)
    const mask = slots.length - 1
    for (let from = 0; from < old.length; from += 2) {
      if (old[from + 1] === 0) continue
      let slot = (old[from] >>> (32 - this.#bits)) * 2
      while (slots[slot + 1] !== 0) slot = (slot + 2) & mask
      slots[slot] = old[from]
      slots[slot + 1] = old[from + 1]
    }
    this.#slots = slots
  }
}

function doubled(array: Float64Array): Float64Array {
  const grown = new Float64Array(array.length * 2)
  grown.set(array)
  return grown
}
