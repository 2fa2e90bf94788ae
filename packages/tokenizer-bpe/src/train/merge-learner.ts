/**
 * @file Learning merges: again and again the most frequent pair of neighbours, ties to the pair of lower ids. Follows the BpeTrainer of Hugging Face
 * tokenizers (tokenizers/src/models/bpe/trainer.rs) to the letter where letters show: which counts change, and when a pair is queued again.
 *
 * Every distinct piece lies once in `cells`, one cell a byte, with an empty cell between pieces. A token covers as many cells as it has bytes and
 * writes its id into the first and the last of them, so neighbours are found without links: the token before cell p ends at p - 1.
 */

const EDGE = -1
const INSIDE = -2
const NONE = -1

export interface LearnerInput {
  /** Ids of the bytes of all pieces, EDGE before, between and after pieces. */
  readonly cells: Int32Array
  /** How often the piece of each cell occurs. */
  readonly weightOf: (cell: number) => number
  /** Tokens so far, spelled in the byte alphabet; grows. */
  readonly tokens: string[]
  readonly idOf: Map<string, number>
  readonly vocabSize: number
  readonly minFrequency: number
  /** A merge whose token would have this many bytes or more is not made. */
  readonly maxTokenLength: number
}

/** Token and pair tables that grow as merges are found. */
export class MergeLearner {
  readonly #input: LearnerInput
  readonly merges: number[] = []
  /** Bytes in each token. */
  #width: Int32Array
  // Pairs, in an open-addressing table of indices + 1.
  #slots = new Int32Array(1 << 16)
  #pairs = 0
  #left = new Int32Array(1 << 14)
  #right = new Int32Array(1 << 14)
  #count = new Float64Array(1 << 14)
  /** Where a pair occurs, as a list that is handed to the queue: first and last node. */
  #head = new Int32Array(1 << 14).fill(NONE)
  #tail = new Int32Array(1 << 14).fill(NONE)
  // List nodes.
  #nodeCell = new Int32Array(1 << 16)
  #nodeNext = new Int32Array(1 << 16)
  #nodes = 0
  #freeNode = NONE
  // The queue: a binary heap of entries.
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

  /** Makes up to `limit` merges; false when there are no more to make. */
  learn(limit: number): boolean {
    const { tokens, idOf, vocabSize, minFrequency } = this.#input
    for (let made = 0; made < limit; ) {
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
      made++
    }
    return true
  }

  #apply(left: number, right: number, id: number, places: Int32Array): void {
    const { cells, weightOf, maxTokenLength } = this.#input
    const width = this.#width
    const leftWidth = width[left]
    const rightWidth = width[right]
    const span = leftWidth + rightWidth
    const touched: number[] = []
    for (const cell of places) {
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

  /** Index of a pair, made on first sight. */
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

  #release(head: number): void {
    let last = head
    while (this.#nodeNext[last] !== NONE) last = this.#nodeNext[last]
    this.#nodeNext[last] = this.#freeNode
    this.#freeNode = head
  }

  /** The cells of an entry that has left the queue, from left to right, so that runs of one token pair off as they are read. */
  #takeCells(entry: number): Int32Array {
    const head = this.#entryHead[entry]
    let size = 0
    for (let node = head; node !== NONE; node = this.#nodeNext[node]) size++
    const places = new Int32Array(size)
    let sorted = true
    let at = 0
    for (let node = head; node !== NONE; node = this.#nodeNext[node]) {
      places[at] = this.#nodeCell[node]
      if (at > 0 && places[at - 1] > places[at]) sorted = false
      at++
    }
    if (!sorted) places.sort()
    this.#release(head)
    this.#freeEntries.push(entry)
    return places
  }

  /** Queues a pair with the places gathered for it. */
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

function grown(array: Int32Array, fill: number): Int32Array<ArrayBuffer> {
  const more = new Int32Array(array.length * 2)
  more.set(array)
  if (fill !== 0) more.fill(fill, array.length)
  return more
}
