/** @file Counts pieces. Takes memory for the distinct pieces only. */
import { PADDING } from '../bpe/encoder.ts'
import { hashLong } from '../bpe/long-piece-cache.ts'
import { hashKey, KEY_MASKS, SHORT_KEY } from '../bpe/piece-cache.ts'

export class PieceCounter {
  /** Concatenated bytes of all distinct pieces, in order of first occurrence. */
  bytes: Uint8Array = new Uint8Array(1 << 16)
  /** Start of piece i in `bytes`; its end is `starts[i + 1]`. */
  starts: Float64Array = new Float64Array(1 << 12)
  /** Number of occurrences of each piece. */
  counts: Float64Array = new Float64Array(1 << 12)
  /** Number of distinct pieces. */
  size = 0
  /** An open-addressing table: hash and index + 1 of each piece. */
  #slots = new Int32Array(2 << 13)
  #bits = 13
  /** Keeps a malicious text from choosing pieces that collide, which would take quadratic time. */
  readonly #seed = (Math.random() * 1e9) | 0
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
        hash = hashKey(k0, k1, k2, k3, width ^ this.#seed)
      } else hash = hashLong(view, from, width, this.#seed)
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
          const at = this.starts[entry - 1]
          if (this.starts[entry] - at === width && this.#equal(at, width, text, from, k0, k1, k2, k3)) {
            this.counts[entry - 1]++
            break
          }
        }
        slot = (slot + 2) & mask
      }
    }
  }

  /** Whether a counted piece equals one of the text; `k0` to `k3` are its key if it is short. */
  #equal(
    at: number,
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
        (view.getInt32(at, true) & KEY_MASKS[row]) === k0 &&
        (view.getInt32(at + 4, true) & KEY_MASKS[row + 1]) === k1 &&
        (view.getInt32(at + 8, true) & KEY_MASKS[row + 2]) === k2 &&
        (view.getInt32(at + 12, true) & KEY_MASKS[row + 3]) === k3
      )
    }
    const bytes = this.bytes
    for (let i = 0; i < width; i++) if (bytes[at + i] !== text[from + i]) return false
    return true
  }

  #insert(text: Uint8Array, from: number, width: number, hash: number, slot: number): void {
    const index = this.size++
    const at = this.starts[index]
    if (at + width + PADDING > this.bytes.length) {
      const grown = new Uint8Array(Math.max(this.bytes.length * 2, at + width + PADDING))
      grown.set(this.bytes)
      this.bytes = grown
      this.#view = new DataView(grown.buffer)
    }
    this.bytes.set(text.subarray(from, from + width), at)
    if (index + 2 > this.starts.length) {
      this.starts = doubled(this.starts)
      this.counts = doubled(this.counts)
    }
    this.starts[index + 1] = at + width
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

/** Returns a copy of twice the size. */
function doubled(array: Float64Array): Float64Array {
  const grown = new Float64Array(array.length * 2)
  grown.set(array)
  return grown
}
