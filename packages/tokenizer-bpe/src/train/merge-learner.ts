/**
 * @file Learns merges: repeatedly the most frequent pair of adjacent tokens, and of equally frequent ones that with the
 * lower ids. Follows the BpeTrainer of Hugging Face tokenizers (tokenizers/src/models/bpe/trainer.rs) in all details
 * that affect the result: which counts change, and when a pair is queued again.
 *
 * All distinct pieces are in `cells`, one cell per byte, with an empty cell between pieces. A token occupies as many
 * cells as it has bytes; its id is in the first and the last of them. So neighbours are found without links: the token
 * before cell p ends at p - 1.
 */

/** A cell between pieces. */
const EDGE = -1
/** A cell within a token, neither its first nor its last. */
const INSIDE = -2
/** No node. */
const NONE = -1

export interface LearnerInput {
  /** Ids of the bytes of all pieces, with EDGE before, between and after pieces. */
  readonly cells: Int32Array
  /** Returns the number of occurrences of a cell's piece. */
  readonly weightOf: (cell: number) => number
  /** Tokens in the byte alphabet. New ones are added. */
  readonly tokens: string[]
  readonly idOf: Map<string, number>
  readonly vocabSize: number
  readonly minFrequency: number
  /** Maximum number of bytes of a new token, exclusive. */
  readonly maxTokenLength: number
}

/** Learns merges from the counts of pieces. */
export class MergeLearner {
  readonly #input: LearnerInput
  readonly merges: number[] = []
  /** Number of bytes of each token. */
  #width: Int32Array
  // Pairs. `#slots` is an open-addressing hash table of their indices + 1.
  #slots = new Int32Array(1 << 16)
  #pairs = 0
  #left = new Int32Array(1 << 14)
  #right = new Int32Array(1 << 14)
  #count = new Float64Array(1 << 14)
  /** First node of the list of new positions of each pair, which move to its queue entry. */
  #head = new Int32Array(1 << 14).fill(NONE)
  /** Last node of the same list. */
  #tail = new Int32Array(1 << 14).fill(NONE)
  // Nodes of the lists of positions.
  #nodeCell = new Int32Array(1 << 16)
  #nodeNext = new Int32Array(1 << 16)
  #nodes = 0
  #freeNode = NONE
  // The priority queue: a binary heap of entries.
  #entryPair = new Int32Array(1 << 14)
  #entryCount = new Float64Array(1 << 14)
  #entryHead = new Int32Array(1 << 14)
  #entries = 0
  #freeEntries: number[] = []
  #heap: number[] = []

  constructor(input: LearnerInput) {
    this.#input = input
    this.#width = new Int32Array(Math.max(1024, input.vocabSize + 1))
    const { cells, weightOf } = input
    for (const id of new Set(cells)) if (id >= 0) this.#width[id] = 1
    for (let cell = 1; cell < cells.length; cell++) {
      if (cells[cell] === EDGE || cells[cell - 1] === EDGE) continue
      const pair = this.#pair(cells[cell - 1], cells[cell])
      this.#count[pair] += weightOf(cell)
      this.#append(pair, cell - 1)
    }
    for (let pair = 0; pair < this.#pairs; pair++) this.#enqueue(pair)
  }

  /** Learns up to `limit` merges. Returns false if there are no more. */
  learn(limit: number): boolean {
    const { tokens, idOf, vocabSize, minFrequency } = this.#input
    for (let learned = 0; learned < limit; ) {
      if (tokens.length >= vocabSize || this.#heap.length === 0) return false
      const entry = this.#heap[0]
      const pair = this.#entryPair[entry]
      const count = this.#count[pair]
      if (this.#entryCount[entry] !== count) {
        this.#entryCount[entry] = count
        this.#sink(0)
        continue
      }
      if (count < 1 || count < minFrequency) return false
      this.#pop()
      const left = this.#left[pair]
      const right = this.#right[pair]
      const text = tokens[left] + tokens[right]
      let id = idOf.get(text)
      if (id === undefined) {
        id = tokens.length
        tokens.push(text)
        idOf.set(text, id)
      }
      this.#width[id] = this.#width[left] + this.#width[right]
      this.merges.push(left, right, id)
      this.#apply(left, right, id, this.#takeCells(entry))
      learned++
    }
    return true
  }

  /** Merges a pair at the given positions, and updates the counts of its neighbours. */
  #apply(left: number, right: number, id: number, positions: Int32Array): void {
    const { cells, weightOf, maxTokenLength } = this.#input
    const width = this.#width
    const leftWidth = width[left]
    const rightWidth = width[right]
    const span = leftWidth + rightWidth
    const touched: number[] = []
    for (const cell of positions) {
      const middle = cell + leftWidth
      if (cells[cell] !== left || cells[middle] !== right) continue
      const weight = weightOf(cell)
      if (leftWidth > 1) cells[middle - 1] = INSIDE
      if (rightWidth > 1) cells[middle] = INSIDE
      cells[cell] = id
      cells[cell + span - 1] = id
      const before = cells[cell - 1]
      if (before !== EDGE) {
        this.#count[this.#pair(before, left)] -= weight
        if (width[before] + span < maxTokenLength) {
          const pair = this.#pair(before, id)
          if (this.#head[pair] === NONE) touched.push(pair)
          this.#count[pair] += weight
          this.#append(pair, cell - width[before])
        }
      }
      const after = cells[cell + span]
      if (after !== EDGE) {
        this.#count[this.#pair(right, after)] -= weight
        if (width[after] + span < maxTokenLength) {
          const pair = this.#pair(id, after)
          if (this.#head[pair] === NONE) touched.push(pair)
          this.#count[pair] += weight
          this.#append(pair, cell)
        }
      }
    }
    for (const pair of touched) {
      if (this.#count[pair] > 0) this.#enqueue(pair)
      else {
        this.#release(this.#head[pair])
        this.#head[pair] = NONE
        this.#tail[pair] = NONE
      }
    }
  }

  /** Returns the index of a pair, adding it if it is new. */
  #pair(left: number, right: number): number {
    const slots = this.#slots
    const mask = slots.length - 1
    let slot = hashPair(left, right) & mask
    while (slots[slot] !== 0) {
      const pair = slots[slot] - 1
      if (this.#left[pair] === left && this.#right[pair] === right) return pair
      slot = (slot + 1) & mask
    }
    const pair = this.#pairs++
    if (pair === this.#left.length) {
      this.#left = grown(this.#left, 0)
      this.#right = grown(this.#right, 0)
      this.#head = grown(this.#head, NONE)
      this.#tail = grown(this.#tail, NONE)
      const count = new Float64Array(pair * 2)
      count.set(this.#count)
      this.#count = count
    }
    this.#left[pair] = left
    this.#right[pair] = right
    slots[slot] = pair + 1
    if (this.#pairs * 2 > slots.length) {
      const more = new Int32Array(slots.length * 2)
      for (let i = 0; i < this.#pairs; i++) {
        let at = hashPair(this.#left[i], this.#right[i]) & (more.length - 1)
        while (more[at] !== 0) at = (at + 1) & (more.length - 1)
        more[at] = i + 1
      }
      this.#slots = more
    }
    return pair
  }

  /** Adds a position to the list of a pair. */
  #append(pair: number, cell: number): void {
    let node = this.#freeNode
    if (node !== NONE) this.#freeNode = this.#nodeNext[node]
    else {
      node = this.#nodes++
      if (node === this.#nodeCell.length) {
        this.#nodeCell = grown(this.#nodeCell, 0)
        this.#nodeNext = grown(this.#nodeNext, 0)
      }
    }
    this.#nodeCell[node] = cell
    this.#nodeNext[node] = NONE
    if (this.#head[pair] === NONE) this.#head[pair] = node
    else this.#nodeNext[this.#tail[pair]] = node
    this.#tail[pair] = node
  }

  /** Frees a list of nodes. */
  #release(head: number): void {
    let last = head
    while (this.#nodeNext[last] !== NONE) last = this.#nodeNext[last]
    this.#nodeNext[last] = this.#freeNode
    this.#freeNode = head
  }

  /** Returns the positions of a dequeued entry from left to right, so that runs of a token merge in reading order. */
  #takeCells(entry: number): Int32Array {
    const head = this.#entryHead[entry]
    let size = 0
    for (let node = head; node !== NONE; node = this.#nodeNext[node]) size++
    const positions = new Int32Array(size)
    let sorted = true
    let at = 0
    for (let node = head; node !== NONE; node = this.#nodeNext[node]) {
      positions[at] = this.#nodeCell[node]
      if (at > 0 && positions[at - 1] > positions[at]) sorted = false
      at++
    }
    if (!sorted) positions.sort()
    this.#release(head)
    this.#freeEntries.push(entry)
    return positions
  }

  /** Queues a pair with its new positions. */
  #enqueue(pair: number): void {
    let entry = this.#freeEntries.pop()
    if (entry === undefined) {
      entry = this.#entries++
      if (entry === this.#entryPair.length) {
        this.#entryPair = grown(this.#entryPair, 0)
        this.#entryHead = grown(this.#entryHead, 0)
        const count = new Float64Array(entry * 2)
        count.set(this.#entryCount)
        this.#entryCount = count
      }
    }
    this.#entryPair[entry] = pair
    this.#entryCount[entry] = this.#count[pair]
    this.#entryHead[entry] = this.#head[pair]
    this.#head[pair] = NONE
    this.#tail[pair] = NONE
    const heap = this.#heap
    let at = heap.length
    heap.push(entry)
    while (at > 0) {
      const parent = (at - 1) >> 1
      if (!this.#goesBefore(entry, heap[parent])) break
      heap[at] = heap[parent]
      at = parent
    }
    heap[at] = entry
  }

  /** Whether entry `a` has priority: a higher count, or the same count and lower ids. */
  #goesBefore(a: number, b: number): boolean {
    const difference = this.#entryCount[a] - this.#entryCount[b]
    if (difference !== 0) return difference > 0
    const p = this.#entryPair[a]
    const q = this.#entryPair[b]
    return this.#left[p] !== this.#left[q] ? this.#left[p] < this.#left[q] : this.#right[p] < this.#right[q]
  }

  #pop(): void {
    const heap = this.#heap
    const last = heap.pop()!
    if (heap.length === 0) return
    heap[0] = last
    this.#sink(0)
  }

  #sink(start: number): void {
    const heap = this.#heap
    const entry = heap[start]
    let at = start
    while (true) {
      let child = at * 2 + 1
      if (child >= heap.length) break
      if (child + 1 < heap.length && this.#goesBefore(heap[child + 1], heap[child])) child++
      if (!this.#goesBefore(heap[child], entry)) break
      heap[at] = heap[child]
      at = child
    }
    heap[at] = entry
  }
}

function hashPair(left: number, right: number): number {
  const h = Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b)
  return h ^ (h >>> 15)
}

/** Returns a copy of twice the size. */
function grown(array: Int32Array, fill: number): Int32Array<ArrayBuffer> {
  const more = new Int32Array(array.length * 2)
  more.set(array)
  if (fill !== 0) more.fill(fill, array.length)
  return more
}
