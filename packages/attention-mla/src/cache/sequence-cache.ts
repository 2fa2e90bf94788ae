/** @file The interface between attention and a cache of earlier tokens, independent of where the rows are stored. */
import { arange, type Backend, fromHost, type HostArray, keep, MoeError, type Tensor } from '@moe/core'
import { disposeTables, type RotaryEmbedding, type RotaryTables } from '../rotary.ts'
import { type CacheRows, cacheError, type RowKind } from './cache-rows.ts'

/** Prompts have steps that occur once; decoding repeats short steps, which are kept up to this many tokens. */
const longestKeptStep = 16

/**
 * A batch of sequences with individual lengths, which are read and extended together. `truncate` removes tokens, as
 * speculative decoding needs.
 */
export abstract class SequenceCache {
  /** Number of sequences. */
  readonly batch: number
  /** Tokens in use of each sequence. */
  readonly lengths: Int32Array
  /** @internal */
  protected readonly memory: CacheRows
  /** Steps by number of new tokens. */
  readonly #steps = new Map<number, CacheStep>()

  protected constructor(batch: number, memory: CacheRows) {
    this.batch = batch
    this.lengths = new Int32Array(batch)
    this.memory = memory
  }

  /** Elements that attention reads per token and layer; without the keys of an indexer. */
  get features(): number {
    return this.memory.features.attention
  }

  /** Dtype of the rows. */
  get dtype() {
    return this.memory.dtype
  }

  /** Where the rows are stored. */
  get backend(): Backend {
    return this.memory.backend
  }

  /** Tokens that each sequence has room for. */
  abstract get capacity(): number

  /** Changes when rows move to other memory or tables change their size, which invalidates recorded steps. */
  abstract get layout(): string

  /** Makes room for `time` more tokens of each sequence. `write` does this automatically. */
  abstract reserve(time: number): void

  /** Returns the index of the row of a layer that stores a token. */
  abstract rowOf(sequence: number, position: number): number

  /** Pages of each sequence, row-major `[batch, width]`; null if the cache has no pages. */
  abstract get pageTable(): Int32Array | null

  /**
   * Returns all rows of a layer in blocks, `[blocks, rows of a block, features]`, in the cache's dtype. A block is a
   * sequence or a page. `kind` is what attention reads (default), or the keys of the layer's indexer.
   */
  rows(layer: number, kind: RowKind = 'attention'): Tensor {
    return this.memory.of(layer, kind)
  }

  /**
   * Returns the first `time` rows of each sequence, `[batch, time, features]`. Rows at or past a sequence's length are
   * undefined.
   */
  abstract first(layer: number, time: number, kind?: RowKind): Tensor

  /**
   * Returns where the next `time` tokens of each sequence are stored. The step belongs to the cache, which updates and
   * returns the same object as long as the layout is unchanged.
   */
  next(time: number): CacheStep {
    let step = this.#steps.get(time)
    if (step !== undefined && step.layout === this.layout) {
      step.update()
      return step
    }
    step?.dispose()
    step = new CacheStep(this, time)
    this.#steps.set(time, step)
    return step
  }

  /**
   * Appends the rows `[batch, time, features]` of a layer to each sequence, rounded to the cache's dtype. Call
   * `advance` once all layers have written.
   * @throws MoeError E_SHAPE for rows of another shape
   */
  write(layer: number, rows: Tensor, kind: RowKind = 'attention'): void {
    const [batch, time, features] = rows.shape
    const expected = this.memory.features[kind]
    if (batch !== this.batch || features !== expected) {
      const room = `a cache of ${this.batch} sequences with ${expected} features`
      throw cacheError('E_SHAPE', 'write', `rows of shape [${rows.shape}] do not fit ${room}`)
    }
    this.reserve(time)
    this.memory.write(layer, kind, this.next(time).index, rows)
  }

  /**
   * Adds `time` tokens, written in every layer, to each sequence. Pass an array for a different number per sequence.
   * @throws MoeError E_ATTR for numbers that cannot have been written; no sequence is changed then
   */
  advance(time: number | ArrayLike<number>): void {
    const after = this.lengths.map((length, b) => {
      const tokens = this.#perSequence('advance', time, b)
      if (Number.isInteger(tokens) && tokens >= 0 && length + tokens <= this.capacity) return length + tokens
      const room = `${length} tokens and a capacity of ${this.capacity}`
      throw cacheError('E_ATTR', 'advance', `cannot add ${tokens} tokens to sequence ${b}, which has ${room}`)
    })
    this.lengths.set(after)
    for (const [length, step] of this.#steps) {
      if (length <= longestKeptStep) continue
      step.dispose()
      this.#steps.delete(length)
    }
  }

  /** Removes the tokens past `length` of every sequence. Pass an array for a different length per sequence. */
  truncate(length: number | ArrayLike<number>): void {
    const after = this.lengths.map((before, b) =>
      Math.min(before, Math.max(0, this.#perSequence('truncate', length, b))),
    )
    this.lengths.set(after)
  }

  /** Returns an argument's number for a sequence. */
  #perSequence(method: string, argument: number | ArrayLike<number>, sequence: number): number {
    const all = typeof argument === 'number'
    const value = all ? argument : argument[sequence]
    if ((all || argument.length === this.batch) && !Number.isNaN(value)) return value
    const given = all ? `${argument}` : `[${Array.from(argument)}]`
    throw cacheError(
      'E_ATTR',
      method,
      `${given} is neither a number nor a list of ${this.batch} numbers, one for each sequence`,
    )
  }

  /** Frees the tensors kept for later steps. */
  dispose(): void {
    for (const step of this.#steps.values()) step.dispose()
    this.#steps.clear()
  }
}

/**
 * Where `time` new tokens of each sequence are stored, as tensors on the device. They are uploaded once for all layers,
 * and updated in place if the backend can, as captured graphs require.
 */
export class CacheStep {
  /** Layout of the cache when this step was created. */
  readonly layout: string
  /** Rows of the new tokens, `i32 [batch * time]`. */
  readonly index: Tensor
  /** Lengths including the new tokens, `i32 [batch]`. */
  readonly lengths: Tensor
  /** Pages of each sequence, `i32 [batch, width]`; undefined if the cache has no pages. */
  readonly pages: Tensor | undefined
  readonly #cache: SequenceCache
  readonly #time: number
  readonly #rotary = new Map<RotaryEmbedding, RotaryTables>()
  /** The values that are on the device. */
  #uploaded: StepData

  /** Use `SequenceCache.next`. @internal */
  constructor(cache: SequenceCache, time: number) {
    this.#cache = cache
    this.#time = time
    this.layout = cache.layout
    this.#uploaded = this.#data()
    const upload = (data: Int32Array<ArrayBuffer>, shape: number[]) => keep(fromHost(data, shape, 'i32', cache.backend))
    const { index, lengths, pages } = this.#uploaded
    this.index = upload(index, [index.length])
    this.lengths = upload(lengths, [lengths.length])
    this.pages = pages && upload(pages, [cache.batch, pages.length / cache.batch])
  }

  /** Returns rotation tables with a batch axis for the positions of the tokens. */
  tables(rotary: RotaryEmbedding): RotaryTables {
    let tables = this.#rotary.get(rotary)
    if (tables === undefined) {
      tables = keep(
        rotary.at(this.#positions(this.#uploaded.lengths), [this.#cache.batch, this.#time], this.index.backend),
      )
      this.#rotary.set(rotary, tables)
    }
    return tables
  }

  /**
   * Returns the index of the row that stores each position of each sequence, `i32 [batch, capacity]`. It is computed on
   * the device from the pages, so that captured graphs see their current values. Positions for which a sequence has no
   * page have an index of one of its other rows.
   */
  positionRows(): Tensor {
    const { batch, capacity, backend } = this.#cache
    if (this.pages === undefined) return arange(batch * capacity, { backend }).reshape([batch, capacity])
    const width = this.pages.shape[1]
    const perPage = capacity / width
    return this.pages
      .reshape([batch, width, 1])
      .mul(perPage)
      .add(arange(perPage, { backend }).reshape([1, 1, perPage]))
      .reshape([batch, capacity])
  }

  /** Updates the tensors to the current state of the cache. */
  update(): void {
    const before = this.#uploaded
    const now = this.#data()
    this.#uploaded = now
    if (!same(before.index, now.index)) overwrite(this.index, now.index)
    if (this.pages && now.pages && !same(before.pages, now.pages)) overwrite(this.pages, now.pages)
    if (same(before.lengths, now.lengths)) return
    overwrite(this.lengths, now.lengths)
    const positions = this.#positions(now.lengths)
    for (const [rotary, { cos, sin, queryFactors }] of this.#rotary) {
      const angles = rotary.angles(positions)
      overwrite(cos, angles.cos)
      overwrite(sin, angles.sin)
      if (queryFactors && angles.queryFactors) overwrite(queryFactors, angles.queryFactors)
    }
  }

  /** Returns the position of each new token, row-major `[batch, time]`, given the lengths that include them. */
  #positions(lengths: Int32Array): Int32Array<ArrayBuffer> {
    const time = this.#time
    return Int32Array.from(
      { length: lengths.length * time },
      (_, i) => lengths[Math.floor(i / time)] - time + (i % time),
    )
  }

  #data(): StepData {
    const time = this.#time
    const cache = this.#cache
    const lengths = Int32Array.from(cache.lengths, length => length + time)
    const index = this.#positions(lengths).map((position, i) => cache.rowOf(Math.floor(i / time), position))
    return { index, lengths, pages: cache.pageTable?.slice() }
  }

  /** Frees the tensors on the device. */
  dispose(): void {
    this.index.dispose()
    this.lengths.dispose()
    this.pages?.dispose()
    for (const tables of this.#rotary.values()) disposeTables(tables)
  }
}

interface StepData {
  readonly index: Int32Array<ArrayBuffer>
  readonly lengths: Int32Array<ArrayBuffer>
  readonly pages: Int32Array<ArrayBuffer> | undefined
}

const same = (a: Int32Array | undefined, b: Int32Array): boolean =>
  a?.length === b.length && a.every((x, i) => x === b[i])

/** Replaces the elements of a tensor that is not recorded: in place if the backend can, otherwise in new memory. */
function overwrite(tensor: Tensor, data: HostArray): void {
  const { backend } = tensor
  if (backend.write) {
    backend.write(tensor, data)
    return
  }
  const before = tensor.handle
  tensor.handle = backend.upload(data, tensor.shape, tensor.dtype)
  backend.free(before)
}

/** Checks that the input has as many sequences as the cache. @throws MoeError E_SHAPE */
export function needSequences(op: string, { shape }: Tensor, cache: SequenceCache): void {
  const [batch] = shape
  if (batch === cache.batch) return
  throw new MoeError({
    code: 'E_SHAPE',
    op,
    problem: `the input has ${batch} sequences, the cache ${cache.batch}`,
    fix: `create the cache with batch: ${batch}, or pass tokens for all its sequences`,
    details: { input: batch, cache: cache.batch },
  })
}

/** Refuses options that are for passes without a cache: `undefined` and `false` are not set. @throws MoeError E_ATTR */
export function refuseWithCache(op: string, options: Readonly<Record<string, unknown>>): void {
  const set = Object.keys(options).filter(name => options[name])
  if (set.length === 0) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `with a cache, ${set.join(', ')} would have no effect`,
    fix: 'leave it out, or pass no cache',
  })
}
