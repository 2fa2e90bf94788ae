/** @file The merges of a vocabulary: an open-addressing hash table from pairs of tokens to ranks. */

/** Rank of pairs that do not merge. */
export const NO_RANK = 0x7fffffff

export class MergeTable {
  /** Resulting token of each merge, by rank. Its length is the number of ranks. */
  readonly product: Int32Array
  /** Rank of each pair of bytes, at `first << 8 | second`, or NO_RANK. Merging starts from these. */
  readonly byteRank: Int32Array = new Int32Array(65536).fill(NO_RANK)
  /** Left token, right token, rank, unused; left is -1 in a free slot. */
  readonly #slots: Int32Array
  readonly #shift: number
  /** Keeps a malicious file from choosing pairs that collide, which would take quadratic time. */
  readonly #seed = (Math.random() * 1e9) | 0
  /** Byte of each token of one byte; otherwise -1. */
  readonly #byteOf: Int16Array

  /**
   * @param ranks number of ranks
   * @param byteToken token of each byte, or -1
   * @param tokens number of ids
   */
  constructor(ranks: number, byteToken: Int32Array, tokens: number) {
    let bits = 4
    while (1 << bits < ranks * 2) bits++
    this.#shift = 32 - bits
    this.#slots = new Int32Array(4 << bits).fill(-1)
    this.product = new Int32Array(ranks)
    this.#byteOf = new Int16Array(tokens).fill(-1)
    for (let byte = 0; byte < 256; byte++) if (byteToken[byte] >= 0) this.#byteOf[byteToken[byte]] = byte
  }

  /** Creates a table of merges in order of rank. Each is left, right and resulting token. */
  static of(merges: Int32Array, byteToken: Int32Array, tokens: number): MergeTable {
    const table = new MergeTable(merges.length / 3, byteToken, tokens)
    for (let i = 0; i < merges.length; i += 3) table.add(i / 3, merges[i], merges[i + 1], merges[i + 2])
    return table
  }

  /** Adds a merge. A pair that is added twice gets the later rank, as in Hugging Face tokenizers. */
  add(rank: number, left: number, right: number, product: number): void {
    this.product[rank] = product
    const slots = this.#slots
    const at = this.#find(left, right)
    slots[at] = left
    slots[at + 1] = right
    slots[at + 2] = rank
    const a = this.#byteOf[left]
    const b = this.#byteOf[right]
    if (a >= 0 && b >= 0) this.byteRank[(a << 8) | b] = rank
  }

  /** Returns the rank of a pair, or NO_RANK. */
  rank(left: number, right: number): number {
    const at = this.#find(left, right)
    return this.#slots[at] < 0 ? NO_RANK : this.#slots[at + 2]
  }

  /** Returns the index in `#slots` of a pair, or of the free slot for it. */
  #find(left: number, right: number): number {
    const slots = this.#slots
    let at =
      ((Math.imul(left ^ this.#seed, 0x9e3779b1) ^ Math.imul(right ^ this.#seed, 0x85ebca6b)) >>> this.#shift) * 4
    while (slots[at] >= 0 && !(slots[at] === left && slots[at + 1] === right)) at = (at + 4) & (slots.length - 1)
    return at
  }
}
