/** @file Which pairs of tokens merge, in which order, into what: an open-addressing table on (left, right). */

/** Rank of a pair that does not merge. */
export const NO_RANK = 0x7fffffff

export class MergeTable {
  /** Token that the merge of each rank makes. */
  readonly product: Int32Array
  /** Rank of each pair of single bytes, at `first << 8 | second`, or NO_RANK: what every piece starts with. */
  readonly byteRank: Int32Array
  /** Whether each merge makes a token that only later merges use, so that ranks can be worked off in rising order. */
  readonly rising: boolean
  readonly count: number
  /** left, right, rank, unused; left is -1 in a free slot. */
  readonly slots: Int32Array
  readonly shift: number

  /**
   * @param merges left, right, product of each merge, in order of rank
   * @param byteToken token of each byte, or -1
   * @param tokens number of ids, above every id in `merges`
   */
  constructor(merges: Int32Array, byteToken: Int32Array, tokens: number) {
    const count = merges.length / 3
    this.count = count
    let bits = 4
    while (1 << bits < count * 2) bits++
    this.shift = 32 - bits
    const slots = new Int32Array(4 << bits).fill(-1)
    const mask = (1 << bits) - 1
    const product = new Int32Array(count)
    // Lowest rank of the merges that use each token.
    const firstUse = new Int32Array(tokens).fill(NO_RANK)
    for (let rank = 0; rank < count; rank++) {
      const left = merges[rank * 3]
      const right = merges[rank * 3 + 1]
      product[rank] = merges[rank * 3 + 2]
      if (firstUse[left] > rank) firstUse[left] = rank
      if (firstUse[right] > rank) firstUse[right] = rank
      let slot = (Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b)) >>> this.shift
      while (slots[slot * 4] !== -1 && !(slots[slot * 4] === left && slots[slot * 4 + 1] === right))
        slot = (slot + 1) & mask
      // A pair that is listed twice has the rank of its last line, as in Hugging Face tokenizers.
      slots[slot * 4] = left
      slots[slot * 4 + 1] = right
      slots[slot * 4 + 2] = rank
    }
    this.slots = slots
    this.product = product
    let rising = true
    for (let rank = 0; rank < count && rising; rank++) rising = firstUse[product[rank]] > rank
    this.rising = rising
    this.byteRank = new Int32Array(65536).fill(NO_RANK)
    for (let a = 0; a < 256; a++) {
      if (byteToken[a] < 0) continue
      for (let b = 0; b < 256; b++) {
        if (byteToken[b] >= 0) this.byteRank[(a << 8) | b] = this.rank(byteToken[a], byteToken[b])
      }
    }
  }

  /** Rank of the merge of two tokens, or NO_RANK. */
  rank(left: number, right: number): number {
    const slots = this.slots
    const mask = (slots.length >>> 2) - 1
    let slot = (Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b)) >>> this.shift
    while (true) {
      const key = slots[slot * 4]
      if (key === left && slots[slot * 4 + 1] === right) return slots[slot * 4 + 2]
      if (key === -1) return NO_RANK
      slot = (slot + 1) & mask
    }
  }
}
