/**
 * @file A cache of the tokens of pieces of up to 16 bytes, which are nearly all of a text: a bounded table in which key
 * and tokens share half a cache line. The number of probes is bounded, so no choice of pieces makes it slow.
 */

/** Maximum length of a piece in bytes. */
export const SHORT_KEY = 16

/** Maximum number of slots that are searched for a key. */
export const PROBES = 8
const MAX_BITS = 18
const MAX_POOL = 1 << 18

/** At index n, a mask for the low n bytes of a little-endian word. */
const LOW_BYTES = Int32Array.of(0, 0xff, 0xffff, 0xffffff, -1)
/** At `4 * length`, the masks of the four words of a key. */
export const KEY_MASKS: Int32Array = new Int32Array((SHORT_KEY + 1) * 4)
for (let length = 0; length <= SHORT_KEY; length++) {
  for (let word = 0; word < 4; word++)
    KEY_MASKS[length * 4 + word] = LOW_BYTES[Math.max(0, Math.min(4, length - word * 4))]
}

/**
 * Number of words in a slot: four of the key, `number of tokens << 8 | mark` (0 in a free slot; the mark is the length,
 * possibly with a flag), and up to three tokens or the index of more in the pool.
 */
export const SLOT = 8

export class PieceCache {
  slots: Int32Array = new Int32Array(SLOT << 10)
  bits = 10
  #used = 0
  pool: Int32Array = new Int32Array(1024)
  #poolUsed = 0

  /** Adds a piece that was not found, under its mark. */
  put(
    k0: number,
    k1: number,
    k2: number,
    k3: number,
    hash: number,
    mark: number,
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
    slots[slot + 4] = (count << 8) | mark
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

  /** Copies tokens to the pool and returns their index. */
  #keep(tokens: Int32Array, count: number): number {
    while (this.#poolUsed + count > this.pool.length) {
      const grown = new Int32Array(this.pool.length * 2)
      grown.set(this.pool)
      this.pool = grown
    }
    const index = this.#poolUsed
    for (let i = 0; i < count; i++) this.pool[index + i] = tokens[i]
    this.#poolUsed = index + count
    return index
  }
}

/** Returns a 32-bit hash of a key. */
export function hashKey(k0: number, k1: number, k2: number, k3: number, mark: number): number {
  let h = Math.imul(k0 ^ mark, 0x9e3779b1)
  h = Math.imul((h ^ (h >>> 15)) + k1, 0x85ebca6b)
  h = Math.imul((h ^ (h >>> 13)) + k2, 0xc2b2ae35)
  h = Math.imul((h ^ (h >>> 16)) + k3, 0x27d4eb2f)
  return (h ^ (h >>> 15)) | 0
}
