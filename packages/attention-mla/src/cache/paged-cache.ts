/**
 * @file A cache of many sequences that come and go. Its memory is pages of as many tokens, which a sequence takes as it grows and gives back at its end (Kwon
 * et al. 2023, "PagedAttention"). Sequences that begin alike share the pages of what they begin with.
 */
import {
  checkOptions,
  defaultBackend,
  dtypeBytes,
  fromHost,
  isMoeError,
  keep,
  type OptionNames,
  type Tensor,
} from '@moe/core'
import { type CacheMemoryOptions, CacheRows, checkSizes, memoryNames, refused } from './cache-rows.ts'
import { SequenceCache } from './sequence-cache.ts'

/** Room, layers and dtype of a cache whose sequences come and go. */
export interface PagedCacheOptions extends CacheMemoryOptions {
  /** Most tokens of all sequences, rounded up to pages. Memory is taken as they need it. */
  readonly tokens: number
  /** Tokens of a page. Default 64. */
  readonly pageSize?: number
  /** How many of the tokens behind a page decide, too, what stands in it: those that MTP modules see ahead. Default 0. */
  readonly lookahead?: number
}

const names: OptionNames<PagedCacheOptions> = { ...memoryNames, tokens: true, pageSize: true, lookahead: true }

/** Pages that memory is taken for at first. */
const pagesAtFirst = 16

/** A sequence in a paged cache. Made by `PagedCache.start`. */
export class PagedSequence {
  /** Tokens in use. */
  length = 0
  /** Its pages, in the order of its tokens. */
  readonly pages: number[] = []
  /** How many of its pages others may share. */
  shared = 0
  /** What stands in these: one number for the same tokens. */
  chain: number

  /** Use `PagedCache.start`. @internal */
  constructor(chain: number) {
    this.chain = chain
  }
}

/** Of a page that may be shared: what it is found by, and the chain that ends with it. */
interface Known {
  readonly key: string
  readonly chain: number
}

/**
 * Rows `[pages, pageSize, features]` per layer. A sequence takes pages as it grows (`start`, `reserve`), takes part in passes (`batch`), and gives
 * them back (`release`).
 */
export class PagedCache {
  /** Tokens of a page. */
  readonly pageSize: number
  readonly #lookahead: number
  #limit: number
  readonly #memory: CacheRows
  readonly #batches = new Map<number, PagedBatch>()
  /** Of each page there is memory for: sequences that use it. */
  readonly #users: number[] = []
  readonly #free: number[] = []
  /** Pages without users whose tokens may come again, the one to give up first in front. */
  readonly #idle = new Set<number>()
  /** Full pages by what they hold and what stands before. */
  readonly #byKey = new Map<string, number>()
  readonly #known = new Map<number, Known>()
  #chains = 0
  /** The chain of no tokens. */
  #root = 0

  /**
   * Takes memory for the first pages.
   * @param features elements per token and layer: `cacheFeatures` of the attention
   * @throws MoeError E_CONFIG for sizes that are no positive integers, or a dtype that a cache cannot have
   */
  constructor(features: number, options: PagedCacheOptions) {
    checkOptions('PagedCache', options, names)
    const { layers, tokens, pageSize = 64, lookahead = 0, dtype = 'f32', backend = defaultBackend() } = options
    checkSizes({ layers, tokens, pageSize, ...(lookahead !== 0 && { lookahead }) }, dtype)
    this.pageSize = pageSize
    this.#lookahead = lookahead
    this.#limit = Math.ceil(tokens / pageSize)
    const blocks = Math.min(pagesAtFirst, this.#limit)
    this.#memory = new CacheRows({ blocks, perBlock: pageSize, features }, { layers, dtype, backend })
    this.#add(blocks)
  }

  /** Tokens that there is room for in pages that nobody uses. */
  get available(): number {
    return (this.#limit - this.#users.length + this.#free.length + this.#idle.size) * this.pageSize
  }

  /** Most tokens of all sequences: what was asked for, or what memory was enough for. */
  get tokens(): number {
    return this.#limit * this.pageSize
  }

  /** Bytes taken now. */
  get bytes(): number {
    const { layers, features, dtype } = this.#memory
    return this.#users.length * this.pageSize * layers * features * dtypeBytes[dtype]
  }

  /** A sequence that holds as many of the tokens as are known, in whole pages, but not the last one: what follows it is wanted. */
  start(tokens: readonly number[]): PagedSequence {
    const sequence = new PagedSequence(this.#root)
    while ((sequence.shared + 1) * this.pageSize < tokens.length) {
      const page = this.#byKey.get(this.#keyOf(sequence, tokens))
      if (page === undefined) break
      this.#users[page]++
      this.#idle.delete(page)
      sequence.pages.push(page)
      sequence.length += this.pageSize
      sequence.shared++
      sequence.chain = (this.#known.get(page) as Known).chain
    }
    return sequence
  }

  /** Pages for `tokens` tokens of a sequence in all. False, and nothing is taken, where there are none, or no memory for them. */
  reserve(sequence: PagedSequence, tokens: number): boolean {
    const more = Math.ceil(tokens / this.pageSize) - sequence.pages.length
    if (more <= 0) return true
    if (more * this.pageSize > this.available) return false
    if (this.#free.length < more) this.#grow(more - this.#free.length)
    if (more > this.#free.length + this.#idle.size) return false
    while (this.#free.length < more) this.#forgetPage(this.#idle.values().next().value as number)
    for (let i = 0; i < more; i++) {
      const page = this.#free.pop() as number
      this.#users[page] = 1
      sequence.pages.push(page)
    }
    return true
  }

  /** Lets others share the pages that the sequence has filled. `tokens` are all that are known of it. */
  share(sequence: PagedSequence, tokens: readonly number[]): void {
    const final = Math.min(sequence.length, tokens.length - this.#lookahead)
    while ((sequence.shared + 1) * this.pageSize <= final) {
      const page = sequence.pages[sequence.shared]
      const key = this.#keyOf(sequence, tokens)
      const other = this.#byKey.get(key)
      if (other === undefined) {
        this.#byKey.set(key, page)
        this.#known.set(page, { key, chain: ++this.#chains })
      }
      sequence.chain = (this.#known.get(other ?? page) as Known).chain
      sequence.shared++
    }
  }

  /** Gives the sequence's pages back. What others may share stays until the pages are needed. */
  release(sequence: PagedSequence): void {
    // The last ones first: what stands before them is worth more.
    for (const page of sequence.pages.splice(0).reverse()) {
      if (--this.#users[page] > 0) continue
      if (this.#known.has(page)) this.#idle.add(page)
      else this.#free.push(page)
    }
    sequence.length = 0
    sequence.shared = 0
    sequence.chain = this.#root
  }

  /** No sequence that starts from here on shares anything with those before: as is due when weights have changed. */
  forget(): void {
    this.#root = ++this.#chains
    for (const page of this.#idle) this.#free.push(page)
    this.#idle.clear()
    this.#byKey.clear()
    this.#known.clear()
  }

  /** As many sequences in one pass, the same object each time. */
  batch(sequences: readonly PagedSequence[]): PagedBatch {
    let batch = this.#batches.get(sequences.length)
    if (batch === undefined) {
      batch = new PagedBatch(sequences.length, this.#memory, this.pageSize)
      this.#batches.set(sequences.length, batch)
    }
    batch.assign(sequences)
    return batch
  }

  /** Frees the pages of all layers. Its sequences and batches are used up. */
  dispose(): void {
    for (const batch of this.#batches.values()) batch.dispose()
    this.#batches.clear()
    this.#memory.dispose()
  }

  /** The next page that the sequence would share: what it stands behind, and the tokens that decide it. */
  #keyOf({ chain, shared }: PagedSequence, tokens: readonly number[]): string {
    const start = shared * this.pageSize
    return `${chain}:${tokens.slice(start, start + this.pageSize + this.#lookahead)}`
  }

  #forgetPage(page: number): void {
    this.#byKey.delete((this.#known.get(page) as Known).key)
    this.#known.delete(page)
    this.#idle.delete(page)
    this.#free.push(page)
  }

  /** As many pages more as there may be. Where memory ends, there are as many as there are. */
  #grow(missing: number): void {
    const before = this.#users.length
    const blocks = Math.min(this.#limit, Math.max(2 * before, before + missing))
    if (blocks === before) return
    try {
      this.#memory.grow({ blocks, perBlock: this.pageSize })
    } catch (error) {
      if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
      this.#limit = before
      return
    }
    this.#add(blocks - before)
  }

  #add(pages: number): void {
    for (let i = 0; i < pages; i++) this.#free.push(this.#users.push(0) - 1)
  }
}

/** Sequences of a paged cache in one pass. Made by `PagedCache.batch`. */
export class PagedBatch extends SequenceCache {
  readonly #pageSize: number
  #sequences: readonly PagedSequence[] = []
  /** Pages of the longest sequence there is a place for, a power of two. */
  #width = 1
  #table: Int32Array
  /** Numbers of the first rows of all sequences, the same for all layers. */
  #gathered: { readonly time: number; readonly index: Tensor } | null = null

  /** Use `PagedCache.batch`. @internal */
  constructor(batch: number, memory: CacheRows, pageSize: number) {
    super(batch, memory)
    this.#pageSize = pageSize
    this.#table = new Int32Array(batch)
  }

  get capacity(): number {
    return this.#width * this.#pageSize
  }

  get layout(): string {
    return `${this.memory.moves} ${this.#width}`
  }

  get pageTable(): Int32Array {
    return this.#table
  }

  /** Takes these sequences, as many as before, in place of those that it had. */
  assign(sequences: readonly PagedSequence[]): void {
    this.#sequences = sequences
    const longest = Math.max(...sequences.map(({ pages }) => pages.length))
    while (this.#width < longest) this.#width *= 2
    this.#table = new Int32Array(this.batch * this.#width)
    for (const [b, { pages, length }] of sequences.entries()) {
      const start = b * this.#width
      // Where it has no pages, its own first one: nobody reads what others wrote.
      this.#table.fill(pages[0] ?? 0, start, start + this.#width)
      this.#table.set(pages, start)
      this.lengths[b] = length
    }
    this.#gathered?.index.dispose()
    this.#gathered = null
  }

  rowOf(sequence: number, position: number): number {
    const page = this.#table[sequence * this.#width + Math.floor(position / this.#pageSize)]
    return page * this.#pageSize + (position % this.#pageSize)
  }

  first(layer: number, time: number): Tensor {
    const rows = this.rows(layer)
    const flat = rows.reshape([rows.shape[0] * rows.shape[1], this.features])
    return flat.takeRows(this.#firstRows(time)).reshape([this.batch, time, this.features])
  }

  #firstRows(time: number): Tensor {
    if (this.#gathered?.time === time) return this.#gathered.index
    const rows = Int32Array.from({ length: this.batch * time }, (_, i) => this.rowOf(Math.floor(i / time), i % time))
    this.#gathered?.index.dispose()
    this.#gathered = { time, index: keep(fromHost(rows, [rows.length], 'i32', this.backend)) }
    return this.#gathered.index
  }

  /** Frees what it keeps on the device; the pages are the cache's. */
  override dispose(): void {
    super.dispose()
    this.#gathered?.index.dispose()
    this.#gathered = null
  }

  /** @throws MoeError E_ATTR where the sequences have no pages for it: `PagedCache.reserve` gets them */
  reserve(time: number): void {
    for (const [b, { pages }] of this.#sequences.entries()) {
      const room = pages.length * this.#pageSize
      if (this.lengths[b] + time <= room) continue
      const problem = `sequence ${b} has ${this.lengths[b]} tokens and room for ${room}, not for ${time} more`
      throw refused('E_ATTR', 'reserve', problem, 'call PagedCache.reserve for it before')
    }
  }

  override advance(time: number | ArrayLike<number>): void {
    super.advance(time)
    this.#tell()
  }

  override truncate(length: number | ArrayLike<number>): void {
    super.truncate(length)
    this.#tell()
  }

  #tell(): void {
    this.#sequences.forEach((sequence, b) => {
      sequence.length = this.lengths[b]
    })
  }
}
