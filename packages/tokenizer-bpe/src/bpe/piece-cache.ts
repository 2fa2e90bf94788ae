/**
 * @file Tokens of pieces of up to 16 bytes that were seen before, nearly all of a text: a bounded table with one half cache line for each, key and
 * tokens together. Probing is bounded, so no choice of pieces makes it slow.
 */

/** Longest piece in the first table, in bytes. */
export const SHORT_KEY = 16

/** Slots looked at for a key. */
export const PROBES = 8
const MAX_BITS = 18
const MAX_POOL = 1 << 18

/** Keeps the low `n` bytes of a little-endian word, at index n. */
const LOW_BYTES = Int32Array.of(0, 0xff, 0xffff, 0xffffff, -1)
/** The masks of the four words of a key, at `4 * length`. */
export const KEY_MASKS: Int32Array = new Int32Array((SHORT_KEY + 1) * 4)
for (let length = 0; length <= SHORT_KEY; length++) {
  for (let word = 0; word < 4; word++)
    KEY_MASKS[length * 4 + word] = LOW_BYTES[Math.max(0, Math.min(4, length - word * 4))]
}

/** A slot: four words of key, `tokens << 8 | mark` (0 in a free slot; the mark is the length, and what the caller adds), then up to three tokens, or where in the pool they are. */
export const SLOT = 8

export class PieceCache {
  slots: Int32Array = new Int32Array(SLOT << 10)
  bits = 10
  #used = 0
  pool: Int32Array = new Int32Array(1024)
  #poolUsed = 0

  /** Puts a piece that was not found in the first table. */
  put(
    k0: number,
    k1: number,
    k2: number,
    k3: number,
    hash: number,
    length: number,
    tokens: Int32Array,
    count: number,
  ): void {
    if (count > 3 && this.#poolUsed + count > MAX_POOL) this.#clear()
    let slot = this.#freeSlot(hash)
    if (slot < 0 || (this.#used * 2 > 1 << this.bits && this.bits < MAX_BITS)) {
      if (this.bits < MAX_BITS) {
        this.#grow()
        slot = this.#freeSlot(hash)
      }
      if (slot < 0) slot = (hash >>> (32 - this.bits)) * SLOT
      else this.#used++
    } else this.#used++
    const slots = this.slots
    slots[slot] = k0
    slots[slot + 1] = k1
    slots[slot + 2] = k2
    slots[slot + 3] = k3
    slots[slot + 4] = (count << 8) | length
    if (count <= 3) {
      for (let i = 0; i < count; i++) slots[slot + 5 + i] = tokens[i]
    } else slots[slot + 5] = this.#keep(tokens, count)
  }

  #clear(): void {
    this.slots.fill(0)
    this.#used = 0
    this.#poolUsed = 0
  }

  #freeSlot(hash: number): number {
    const slots = this.slots
    const mask = (1 << this.bits) - 1
    const first = hash >>> (32 - this.bits)
    for (let probe = 0; probe < PROBES; probe++) {
      const slot = ((first + probe) & mask) * SLOT
      if (slots[slot + 4] === 0) return slot
    }
    return -1
  }

  #grow(): void {
    const old = this.slots
    this.bits++
    this.slots = new Int32Array(SLOT << this.bits)
    this.#used = 0
    for (let from = 0; from < old.length; from += SLOT) {
      if (old[from + 4] === 0) continue
      const slot = this.#freeSlot(hashKey(old[from], old[from + 1], old[from + 2], old[from + 3], old[from + 4] & 0xff))
      if (slot < 0) continue
      for (let i = 0; i < SLOT; i++) this.slots[slot + i] = old[from + i]
      this.#used++
    }
  }

  #keep(tokens: Int32Array, count: number): number {
    while (this.#poolUsed + count > this.pool.length) {
      const grown = new Int32Array(this.pool.length * 2)
      grown.set(this.pool)
      this.pool = grown
    }
    const place = this.#poolUsed
    for (let i = 0; i < count; i++) this.pool[place + i] = tokens[i]
    this.#poolUsed = place + count
    return place
  }
}

/** 32-bit hash of a short key. */
export function hashKey(k0: number, k1: number, k2: number, k3: number, length: number): number {
  let h = Math.imul(k0 ^ length, 0x9e3779b1)
  h = Math.imul((h ^ (h >>> 15)) + k1, 0x85ebca6b)
  h = Math.imul((h ^ (h >>> 13)) + k2, 0xc2b2ae35)
  h = Math.imul((h ^ (h >>> 16)) + k3, 0x27d4eb2f)
  return (h ^ (h >>> 15)) | 0
}
