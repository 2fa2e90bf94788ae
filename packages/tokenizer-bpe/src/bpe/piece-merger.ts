/**
 * @file Merges the bytes of a piece to tokens: always the pair of lowest rank, and of those the leftmost. Three methods
 * give the same tokens: a linear search per merge for short pieces; for long ones, processing ranks in ascending order,
 * which is linear apart from sorting the ranks; and a heap for vocabularies for which that does not work.
 */
import { type MergeTable, NO_RANK } from './merge-table.ts'

/** Maximum number of symbols for the search per merge, which takes quadratic time. */
const SHORT = 96

export class PieceMerger {
  readonly table: MergeTable
  readonly #byteToken: Int32Array
  /** Token for bytes that are not in the vocabulary, or -1 to drop them, as in Hugging Face tokenizers. */
  readonly #unknown: number
  readonly #fuseUnknown: boolean
  /** Whether every byte has a token. */
  readonly complete: boolean
  readonly #symbol = new Int32Array(SHORT + 1)
  readonly #rank = new Int32Array(SHORT + 1)
  #head: Int32Array | undefined
  /** Tokens of the last piece, valid until the next call. */
  out: Int32Array = new Int32Array(SHORT + 1)

  constructor(table: MergeTable, byteToken: Int32Array, unknown: number, fuseUnknown: boolean) {
    this.table = table
    this.#byteToken = byteToken
    this.#unknown = unknown
    this.#fuseUnknown = fuseUnknown
    this.complete = byteToken.every(token => token >= 0)
  }

  /** Merges `bytes[start..end)` into `out` and returns the number of tokens. */
  merge(bytes: Uint8Array, start: number, end: number): number {
    const length = end - start
    if (length > SHORT) return this.#long(this.#symbols(bytes, start, end))
    if (!this.complete) return this.#incomplete(bytes, start, end)
    const symbol = this.#symbol
    const rank = this.#rank
    const byteRank = this.table.byteRank
    const byteToken = this.#byteToken
    let before = bytes[start]
    symbol[0] = byteToken[before]
    for (let i = 1; i < length; i++) {
      const byte = bytes[start + i]
      symbol[i] = byteToken[byte]
      rank[i - 1] = byteRank[(before << 8) | byte]
      before = byte
    }
    return this.#search(length)
  }

  /** Merges a short piece, searching all pairs for the lowest rank. */
  #search(length: number): number {
    const symbol = this.#symbol
    const rank = this.#rank
    const table = this.table
    const product = table.product
    while (length > 1) {
      let best = NO_RANK
      let at = -1
      for (let i = 0; i < length - 1; i++) {
        if (rank[i] < best) {
          best = rank[i]
          at = i
        }
      }
      if (at < 0) break
      const merged = product[best]
      symbol[at] = merged
      length--
      for (let i = at + 1; i < length; i++) {
        symbol[i] = symbol[i + 1]
        rank[i] = rank[i + 1]
      }
      if (at > 0) rank[at - 1] = table.rank(symbol[at - 1], merged)
      if (at < length - 1) rank[at] = table.rank(merged, symbol[at + 1])
    }
    const out = this.out
    for (let i = 0; i < length; i++) out[i] = symbol[i]
    return length
  }

  /** Merges a short piece if some bytes have no token. */
  #incomplete(bytes: Uint8Array, start: number, end: number): number {
    const symbols = this.#symbols(bytes, start, end)
    const length = symbols.length
    this.#symbol.set(symbols)
    for (let i = 1; i < length; i++) this.#rank[i - 1] = this.table.rank(symbols[i - 1], symbols[i])
    return this.#search(length)
  }

  /** Returns the tokens of the bytes. */
  #symbols(bytes: Uint8Array, start: number, end: number): Int32Array {
    const symbols = new Int32Array(end - start)
    let length = 0
    let fuses = false
    for (let i = start; i < end; i++) {
      const token = this.#byteToken[bytes[i]]
      const isUnknown = token < 0
      if (!isUnknown) symbols[length++] = token
      else if (this.#unknown >= 0 && !fuses) symbols[length++] = this.#unknown
      fuses = isUnknown && this.#fuseUnknown
    }
    return symbols.subarray(0, length)
  }

  /** Merges a long piece. */
  #long(symbols: Int32Array): number {
    const length = symbols.length
    if (this.out.length < length) this.out = new Int32Array(Math.max(length, this.out.length * 2))
    const next = new Int32Array(length)
    const before = new Int32Array(length)
    for (let i = 0; i < length; i++) {
      next[i] = i + 1
      before[i] = i - 1
    }
    this.#head ??= new Int32Array(this.table.product.length).fill(-1)
    if (!new RankOrderMerger(this.table, symbols, next, before, this.#head).run(NO_RANK, 0)) {
      this.#head.fill(-1)
      mergeByHeap(this.table, symbols, next, before)
    }
    const out = this.out
    let count = 0
    for (let i = 0; i < length; i = next[i]) out[count++] = symbols[i]
    // Do not keep the memory of an extremely long piece.
    if (length > 1 << 20) {
      const result = out.slice(0, count)
      this.out = result.length > SHORT ? result : new Int32Array(SHORT + 1)
      if (result.length <= SHORT) this.out.set(result)
    }
    return count
  }
}

/**
 * Processes the ranks that occur in ascending order. The positions of each rank form a doubly linked list. A merge
 * nearly always creates pairs of higher rank only, so a list is complete when its rank is processed. A lower rank that
 * it creates is processed immediately.
 */
class RankOrderMerger {
  readonly #table: MergeTable
  readonly #symbol: Int32Array
  readonly #next: Int32Array
  readonly #before: Int32Array
  readonly #rankAt: Int32Array
  readonly #listNext: Int32Array
  readonly #listBefore: Int32Array
  /** First position of each rank, or -1. All are -1 again after a successful run. */
  readonly #head: Int32Array
  readonly #queue = new KeyHeap()

  constructor(table: MergeTable, symbol: Int32Array, next: Int32Array, before: Int32Array, head: Int32Array) {
    this.#table = table
    this.#symbol = symbol
    this.#next = next
    this.#before = before
    this.#rankAt = new Int32Array(symbol.length).fill(NO_RANK)
    this.#listNext = new Int32Array(symbol.length)
    this.#listBefore = new Int32Array(symbol.length)
    this.#head = head
  }

  /**
   * Performs all merges of a rank below `limit`. Returns false if it has to stop early; the merges until then are
   * correct.
   */
  run(limit: number, depth: number): boolean {
    const symbol = this.#symbol
    const next = this.#next
    const before = this.#before
    const rankAt = this.#rankAt
    const listNext = this.#listNext
    const listBefore = this.#listBefore
    const length = symbol.length
    // From right to left, so that every list starts in order of position.
    if (depth === 0) for (let i = length - 2; i >= 0; i--) this.#add(i)
    while (this.#queue.least < limit) {
      const rank = this.#queue.pop()
      const first = this.#head[rank]
      if (first < 0) continue
      this.#head[rank] = -1
      let count = 0
      let last = -1
      let rises = true
      let falls = true
      for (let at = first; at >= 0; at = listNext[at]) {
        if (at < last) rises = false
        else if (count > 0) falls = false
        last = at
        count++
      }
      const positions = new Int32Array(count)
      count = 0
      // These are no longer in a list: WAITING prevents #remove from changing links.
      for (let at = first; at >= 0; at = listNext[at]) {
        positions[count++] = at
        listBefore[at] = WAITING
      }
      if (!rises) {
        if (falls) positions.reverse()
        else positions.sort()
      }
      const merged = this.#table.product[rank]
      for (let i = 0; i < count; i++) {
        const at = positions[i]
        if (rankAt[at] !== rank || listBefore[at] !== WAITING) continue
        const right = next[at]
        rankAt[at] = NO_RANK
        this.#remove(right)
        const after = next[right]
        symbol[at] = merged
        next[at] = after
        if (after < length) before[after] = at
        const left = before[at]
        if (left >= 0) {
          this.#remove(left)
          this.#add(left)
        }
        this.#add(at)
        if (this.#queue.least < rank) {
          if (depth === MAX_DEPTH || !this.run(rank, depth + 1)) return false
          // New positions of this rank would have to be inserted among the waiting ones.
          if (this.#head[rank] >= 0) return false
        }
      }
    }
    return true
  }

  /** Adds a position to the list of its pair's rank. */
  #add(at: number): void {
    const right = this.#next[at]
    const rank = right < this.#symbol.length ? this.#table.rank(this.#symbol[at], this.#symbol[right]) : NO_RANK
    this.#rankAt[at] = rank
    if (rank === NO_RANK) return
    const first = this.#head[rank]
    if (first < 0) this.#queue.push(rank)
    else this.#listBefore[first] = at
    this.#listNext[at] = first
    this.#listBefore[at] = -1
    this.#head[rank] = at
  }

  /** Removes a position from its list. */
  #remove(at: number): void {
    const rank = this.#rankAt[at]
    if (rank === NO_RANK) return
    this.#rankAt[at] = NO_RANK
    const a = this.#listBefore[at]
    if (a === WAITING) return
    const b = this.#listNext[at]
    if (b >= 0) this.#listBefore[b] = a
    if (a >= 0) this.#listNext[a] = b
    else this.#head[rank] = b
  }
}

/** In place of a list link: the position waits to be merged. */
const WAITING = -2
const MAX_DEPTH = 30

/** Merges with a heap of (rank, position) with lazy removal, in time n log n for any vocabulary. */
function mergeByHeap(table: MergeTable, symbol: Int32Array, next: Int32Array, before: Int32Array): void {
  const length = symbol.length
  const rankAt = new Int32Array(length).fill(NO_RANK)
  // `rank * length + position` is exact in a double: ranks are below 2^24, lengths below 2^29.
  const heap = new KeyHeap()
  const add = (at: number) => {
    const rank = next[at] < length ? table.rank(symbol[at], symbol[next[at]]) : NO_RANK
    rankAt[at] = rank
    if (rank !== NO_RANK) heap.push(rank * length + at)
  }
  // Some merges may have been performed already.
  for (let i = 0; next[i] < length; i = next[i]) add(i)
  while (heap.size > 0) {
    const key = heap.pop()
    const rank = Math.floor(key / length)
    const at = key - rank * length
    if (rankAt[at] !== rank) continue
    const right = next[at]
    const after = next[right]
    rankAt[right] = NO_RANK
    symbol[at] = table.product[rank]
    next[at] = after
    if (after < length) before[after] = at
    if (before[at] >= 0) add(before[at])
    add(at)
  }
}

/** A binary heap of numbers. */
class KeyHeap {
  #items = new Float64Array(256)
  size = 0

  get least(): number {
    return this.size === 0 ? NO_RANK : this.#items[0]
  }

  push(key: number): void {
    if (this.size === this.#items.length) {
      const grown = new Float64Array(this.size * 2)
      grown.set(this.#items)
      this.#items = grown
    }
    const items = this.#items
    let at = this.size++
    while (at > 0) {
      const parent = (at - 1) >> 1
      if (items[parent] <= key) break
      items[at] = items[parent]
      at = parent
    }
    items[at] = key
  }

  pop(): number {
    const items = this.#items
    const top = items[0]
    const last = items[--this.size]
    let at = 0
    while (true) {
      let child = at * 2 + 1
      if (child >= this.size) break
      if (child + 1 < this.size && items[child + 1] < items[child]) child++
      if (items[child] >= last) break
      items[at] = items[child]
      at = child
    }
    items[at] = last
    return top
  }
}
