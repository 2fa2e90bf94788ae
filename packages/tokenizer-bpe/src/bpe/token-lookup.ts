/** @file Looks up whether a piece is a token, for vocabularies that check this before merging (`ignore_merges`). */
import { SHORT_KEY } from './piece-cache.ts'

export class TokenLookup {
  readonly #bytes: Uint8Array
  readonly #starts: Int32Array
  readonly #lengths: Int32Array
  /** An open-addressing table of ids + 1, by the hash of their bytes. */
  readonly #slots: Int32Array
  readonly #shift: number
  /** Keeps a malicious file from choosing tokens that collide, which would take quadratic time. */
  readonly #seed = (Math.random() * 1e9) | 0
  /** 1 at the hashes of length, start and end of long tokens, to rule out most long pieces quickly. */
  readonly #outlines = new Uint8Array(65536)

  /** @param bytes, starts, lengths bytes of all tokens; token i is `lengths[i]` bytes at `starts[i]` */
  constructor(bytes: Uint8Array, starts: Int32Array, lengths: Int32Array) {
    this.#bytes = bytes
    this.#starts = starts
    this.#lengths = lengths
    let bits = 4
    while (1 << bits < starts.length * 2) bits++
    this.#shift = 32 - bits
    this.#slots = new Int32Array(1 << bits)
    for (let id = 0; id < starts.length; id++) {
      if (lengths[id] === 0) continue
      if (lengths[id] > SHORT_KEY) this.#outlines[outline(bytes, starts[id], starts[id] + lengths[id])] = 1
      let slot = hashBytes(bytes, starts[id], lengths[id], this.#seed) >>> this.#shift
      while (this.#slots[slot] !== 0) slot = (slot + 1) & (this.#slots.length - 1)
      this.#slots[slot] = id + 1
    }
  }

  /** Returns the id of the token with the bytes `text[from..to)`, or -1. */
  find(text: Uint8Array, from: number, to: number): number {
    const length = to - from
    if (length > SHORT_KEY && this.#outlines[outline(text, from, to)] === 0) return -1
    const slots = this.#slots
    for (
      let slot = hashBytes(text, from, length, this.#seed) >>> this.#shift;
      slots[slot] !== 0;
      slot = (slot + 1) & (slots.length - 1)
    ) {
      const id = slots[slot] - 1
      if (this.#lengths[id] !== length) continue
      const start = this.#starts[id]
      let i = 0
      while (i < length && this.#bytes[start + i] === text[from + i]) i++
      if (i === length) return id
    }
    return -1
  }
}

/** Returns a 16-bit hash of the length, the start and the end. */
function outline(bytes: Uint8Array, from: number, to: number): number {
  const head = (bytes[from + 1] << 16) | (bytes[from + 2] << 8) | bytes[from + 5]
  const tail = (bytes[to - 1] << 16) | (bytes[to - 2] << 8) | bytes[to - 4]
  return (Math.imul(head, 0x9e3779b1) ^ Math.imul(tail ^ ((to - from) << 24), 0x85ebca6b)) >>> 16
}

function hashBytes(bytes: Uint8Array, start: number, length: number, seed: number): number {
  let h = Math.imul(length ^ seed, 0x9e3779b1)
  for (let i = 0; i < length; i++) h = Math.imul(h ^ bytes[start + i], 0x01000193) + (h >>> 15)
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b)
  return (h ^ (h >>> 13)) | 0
}

export const features = { tokenLookup: TokenLookup }
