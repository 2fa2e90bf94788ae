/**
 * @file A paged cache for many sequences with different lifetimes. Its memory consists of pages with a fixed number of
 * tokens, which a sequence allocates as it grows and returns at its end (Kwon et al. 2023, "PagedAttention"). Sequences
 * with a common prefix share the pages of that prefix.
 */
import { checkOptions, defaultBackend, fromHost, isMoeError, keep, type OptionNames, type Tensor } from '@moe/core'
import {
  type CacheFeatures,
  type CacheMemoryOptions,
  CacheRows,
  cacheError,
  cacheFeaturesOf,
  checkSizes,
  memoryNames,
  type RowKind,
} from './cache-rows.ts'
import { SequenceCache } from './sequence-cache.ts'

/** Options of a paged cache. */
export interface PagedCacheOptions extends CacheMemoryOptions {
  /** Maximum number of tokens over all sequences, rounded up to whole pages. Memory is allocated as needed. */
  readonly tokens: number
  /** Tokens per page. Default 64. */
  readonly pageSize?: number | undefined
  /** How many tokens after a page also determine its contents: those that MTP modules look ahead. Default 0. */
  readonly lookahead?: number | undefined
}

const names: OptionNames<PagedCacheOptions> = { ...memoryNames, tokens: true, pageSize: true, lookahead: true }

/** Number of pages that are allocated initially. */
const pagesAtFirst = 16

/** A sequence in a paged cache, created by `PagedCache.start`. */
export class PagedSequence {
  /** Tokens in use. */
  length = 0
  /** Its pages, in the order of its tokens. */
  readonly pages: number[] = []
  /** How many of its pages other sequences may share. */
  shared = 0
  /** Identifies the contents of these pages: equal for equal tokens. */
  prefixId: number

  /** Use `PagedCache.start`. @internal */
  constructor(chain: number) {
    this.prefixId = chain
  }
}

/** A page that may be shared: its lookup key, and the chain that ends with it. */
interface SharedPage {
  readonly key: string
  readonly chain: number
}

/**
 * A cache with rows `[pages, pageSize, features]` per layer. A sequence is created by `start`, gets pages from
 * `reserve`, takes part in forward passes through `batch`, and returns its pages with `release`.
 */
export class PagedCache {
  /** Tokens per page. */
  readonly pageSize: number
  readonly #lookahead: number
  #limit: number
  readonly #memory: CacheRows
  readonly #batches = new Map<number, PagedBatch>()
  /** For each allocated page, the number of sequences that use it. */
  readonly #users: number[] = []
  readonly #free: number[] = []
  /** Unused pages whose contents may be reused, least recently used first. */
  readonly #idle = new Set<number>()
  /** Full pages by their contents and those of all pages before. */
  readonly #byKey = new Map<string, number>()
  readonly #sharedPages = new Map<number, SharedPage>()
  #chains = 0
  /** The chain of an empty sequence. */
  #root = 0

  /**
   * Allocates the first pages.
   * @param features elements per token and layer: `cacheFeatures` of the attention. A number stands for rows that
   * attention reads, without those of an indexer.
   * @throws MoeError E_CONFIG for sizes that are not positive integers, or an unsupported dtype
   */
  constructor(features: number | CacheFeatures, options: PagedCacheOptions) {
    checkOptions('PagedCache', options, names)
    const {
      layers,
      indexLayers,
      tokens,
      pageSize = 64,
      lookahead = 0,
      dtype = 'f32',
      backend = defaultBackend(),
    } = options
    checkSizes({ layers, tokens, pageSize, ...(lookahead !== 0 && { lookahead }) }, dtype)
    this.pageSize = pageSize
    this.#lookahead = lookahead
    this.#limit = Math.ceil(tokens / pageSize)
    const blocks = Math.min(pagesAtFirst, this.#limit)
    const shape = { blocks, perBlock: pageSize, features: cacheFeaturesOf(features) }
    this.#memory = new CacheRows(shape, { layers, indexLayers, dtype, backend })
    this.#add(blocks)
  }

  /** Number of tokens for which unused pages are available. */
  get available(): number {
    return (this.#limit - this.#users.length + this.#free.length + this.#idle.size) * this.pageSize
  }

  /** Maximum number of tokens over all sequences: as requested, or less if memory ran out. */
  get tokens(): number {
    return this.#limit * this.pageSize
  }

  /** Bytes currently allocated. */
  get bytes(): number {
    return this.#users.length * this.pageSize * this.#memory.bytesPerToken
  }

  /**
   * Starts a sequence that already contains the longest cached prefix of `tokens`, in whole pages. The last token is
   * never included, because it must be processed to get its output.
   */
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
      sequence.prefixId = (this.#sharedPages.get(page) as SharedPage).chain
    }
    return sequence
  }

  /**
   * Makes sure that a sequence has pages for `tokens` tokens in total. Returns false, and allocates nothing, if there
   * are not enough pages or not enough memory.
   */
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

  /** Lets other sequences share the full pages of this sequence. `tokens` are all its known tokens. */
  share(sequence: PagedSequence, tokens: readonly number[]): void {
    const final = Math.min(sequence.length, tokens.length - this.#lookahead)
    while ((sequence.shared + 1) * this.pageSize <= final) {
      const page = sequence.pages[sequence.shared]
      const key = this.#keyOf(sequence, tokens)
      const other = this.#byKey.get(key)
      if (other === undefined) {
        this.#byKey.set(key, page)
        this.#sharedPages.set(page, { key, chain: ++this.#chains })
      }
      sequence.prefixId = (this.#sharedPages.get(other ?? page) as SharedPage).chain
      sequence.shared++
    }
  }

  /** Returns the pages of a sequence. Shareable pages keep their contents until the memory is needed. */
  release(sequence: PagedSequence): void {
    // The last pages first, so that they are reused first: earlier pages are more likely to be shared.
    for (const page of sequence.pages.splice(0).reverse()) {
      if (--this.#users[page] > 0) continue
      if (this.#sharedPages.has(page)) this.#idle.add(page)
      else this.#free.push(page)
    }
    sequence.length = 0
    sequence.shared = 0
    sequence.prefixId = this.#root
  }

  /**
   * Discards all shareable prefixes, so that sequences started from now on share nothing with earlier ones. Call it
   * when weights have changed.
   */
  clearPrefixes(): void {
    this.#root = ++this.#chains
    for (const page of this.#idle) this.#free.push(page)
    this.#idle.clear()
    this.#byKey.clear()
    this.#sharedPages.clear()
  }

  /** Returns a batch of sequences for a forward pass. The same object is returned for the same number of sequences. */
  batch(sequences: readonly PagedSequence[]): PagedBatch {
    let batch = this.#batches.get(sequences.length)
    if (batch === undefined) {
      batch = new PagedBatch(sequences.length, this.#memory, this.pageSize)
      this.#batches.set(sequences.length, batch)
    }
    batch.assign(sequences)
    return batch
  }

  /** Frees the pages of all layers. Its sequences and batches must not be used afterwards. */
  dispose(): void {
    for (const batch of this.#batches.values()) batch.dispose()
    this.#batches.clear()
    this.#memory.dispose()
  }

  /**
   * Returns the lookup key of the next page that the sequence would share: the pages before it, and the tokens that
   * determine it.
   */
  #keyOf({ prefixId: chain, shared }: PagedSequence, tokens: readonly number[]): string {
    const start = shared * this.pageSize
    return `${chain}:${tokens.slice(start, start + this.pageSize + this.#lookahead)}`
  }

  #forgetPage(page: number): void {
    this.#byKey.delete((this.#sharedPages.get(page) as SharedPage).key)
    this.#sharedPages.delete(page)
    this.#idle.delete(page)
    this.#free.push(page)
  }

  /** Allocates at least `missing` more pages, as far as limit and memory allow: as many as there are, or a part of that. */
  #grow(missing: number): void {
    const before = this.#users.length
    let more = Math.min(this.#limit - before, Math.max(before, missing))
    while (more > 0) {
      try {
        this.#memory.grow({ blocks: before + more, perBlock: this.pageSize })
        break
      } catch (error) {
        if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
        more = more > missing ? Math.max(missing, Math.floor(more / 2)) : 0
        this.#limit = before + more
      }
    }
    this.#add(more)
  }

  #add(pages: number): void {
    for (let i = 0; i < pages; i++) this.#free.push(this.#users.push(0) - 1)
  }
}

/** Sequences of a paged cache in one forward pass. Created by `PagedCache.batch`. */
export class PagedBatch extends SequenceCache {
  readonly #pageSize: number
  #sequences: readonly PagedSequence[] = []
  /** Maximum number of pages per sequence, a power of two. */
  #width = 1
  #table: Int32Array
  /** Indices of the first rows of all sequences, the same for all layers. */
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

  /** Replaces the sequences by others; the number must stay the same. */
  assign(sequences: readonly PagedSequence[]): void {
    this.#sequences = sequences
    const longest = Math.max(...sequences.map(({ pages }) => pages.length))
    while (this.#width < longest) this.#width *= 2
    this.#table = new Int32Array(this.batch * this.#width)
    for (const [b, { pages, length }] of sequences.entries()) {
      const start = b * this.#width
      // Unused entries point to the sequence's own first page, so that no sequence reads another's rows.
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

  first(layer: number, time: number, kind?: RowKind): Tensor {
    const rows = this.rows(layer, kind)
    const [blocks, perBlock, features] = rows.shape
    const flat = rows.reshape([blocks * perBlock, features])
    return flat.takeRows(this.#firstRows(time)).reshape([this.batch, time, features])
  }

  #firstRows(time: number): Tensor {
    if (this.#gathered?.time === time) return this.#gathered.index
    const rows = Int32Array.from({ length: this.batch * time }, (_, i) => this.rowOf(Math.floor(i / time), i % time))
    this.#gathered?.index.dispose()
    this.#gathered = { time, index: keep(fromHost(rows, [rows.length], 'i32', this.backend)) }
    return this.#gathered.index
  }

  /** Frees the tensors kept on the device. The pages belong to the cache. */
  override dispose(): void {
    super.dispose()
    this.#gathered?.index.dispose()
    this.#gathered = null
  }

  /**
   * Checks that every sequence has pages for `time` more tokens; `PagedCache.reserve` allocates them.
   * @throws MoeError E_ATTR
   */
  reserve(time: number): void {
    for (const [b, { pages }] of this.#sequences.entries()) {
      const room = pages.length * this.#pageSize
      if (this.lengths[b] + time <= room) continue
      const problem = `sequence ${b} has ${this.lengths[b]} tokens and pages for ${room}, which leaves no room for ${time} more`
      throw cacheError('E_ATTR', 'reserve', problem, 'call PagedCache.reserve for it first')
    }
  }

  override advance(time: number | ArrayLike<number>): void {
    super.advance(time)
    this.#syncLengths()
  }

  override truncate(length: number | ArrayLike<number>): void {
    super.truncate(length)
    this.#syncLengths()
  }

  #syncLengths(): void {
    this.#sequences.forEach((sequence, b) => {
      sequence.length = this.lengths[b]
    })
  }
}
