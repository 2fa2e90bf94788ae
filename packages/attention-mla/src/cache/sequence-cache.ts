/** @file What attention needs of the earlier tokens of some sequences, wherever their rows lie. */
import { type Backend, fromHost, type HostArray, keep, MoeError, type Tensor } from '@moe/core'
import type { RotaryEmbedding, RotaryTables } from '../rotary.ts'
import { type CacheRows, refused } from './cache-rows.ts'

/** Steps of prompts come once, those of decoding again and again. */
const longestKept = 16

/** Sequences of their own lengths that are read and continued together; `truncate` takes tokens back, as speculative decoding needs. */
export abstract class SequenceCache {
  /** Sequences. */
  readonly batch: number
  /** Tokens in use of each sequence. */
  readonly lengths: Int32Array
  /** @internal */
  protected readonly memory: CacheRows
  /** By number of new tokens. */
  readonly #steps = new Map<number, CacheStep>()

  protected constructor(batch: number, memory: CacheRows) {
    this.batch = batch
    this.lengths = new Int32Array(batch)
    this.memory = memory
  }

  /** Elements per token and layer. */
  get features(): number {
    return this.memory.features
  }

  /** Of the rows. */
  get dtype() {
    return this.memory.dtype
  }

  /** Where the rows are. */
  get backend(): Backend {
    return this.memory.backend
  }

  /** Tokens that each sequence has room for. */
  abstract get capacity(): number

  /** Changes when rows move to other memory or tables to other sizes: what was recorded before is void then. */
  abstract get layout(): string

  /** Makes room for `time` more tokens of each sequence; `write` does it by itself. */
  abstract reserve(time: number): void

  /** Number of the row of a layer that holds a token. */
  abstract rowOf(sequence: number, position: number): number

  /** Pages of each sequence, row-major `[batch, width]`, where rows lie in pages. */
  abstract get pageTable(): Int32Array | null

  /** All rows of a layer in blocks, `[blocks, rows of a block, features]` in the cache's dtype: a block is a sequence, or a page. */
  rows(layer: number): Tensor {
    return this.memory.of(layer)
  }

  /** The first `time` rows of each sequence `[batch, time, features]`; those at or past its length mean nothing. */
  abstract first(layer: number, time: number): Tensor

  /** Where the next `time` tokens of each sequence go. It belongs to the cache and is the same object, brought up to date, as long as it fits. */
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

  /** Writes the rows `[batch, time, features]`, rounded to the cache's dtype, of a layer behind each sequence. Call `advance` once all layers have written. */
  write(layer: number, rows: Tensor): void {
    const [batch, time, features] = rows.shape
    if (batch !== this.batch || features !== this.features) {
      const room = `a cache of ${this.batch} sequences with ${this.features} features`
      throw refused('E_SHAPE', 'write', `rows [${rows.shape}] do not fit ${room}`)
    }
    this.reserve(time)
    this.memory.write(layer, this.next(time).index, rows)
  }

  /**
   * Counts `time` tokens, written in every layer, as part of each sequence (or of each its own number, 0 where nothing of it counts).
   * @throws MoeError E_ATTR for numbers that cannot have been written; no sequence is changed then.
   */
  advance(time: number | ArrayLike<number>): void {
    const after = this.lengths.map((length, b) => {
      const tokens = this.#perSequence('advance', time, b)
      if (Number.isInteger(tokens) && tokens >= 0 && length + tokens <= this.capacity) return length + tokens
      const room = `${length} tokens in room for ${this.capacity}`
      throw refused('E_ATTR', 'advance', `sequence ${b} cannot go on by ${tokens}: it has ${room}`)
    })
    this.lengths.set(after)
    for (const [length, step] of this.#steps) {
      if (length <= longestKept) continue
      step.dispose()
      this.#steps.delete(length)
    }
  }

  /** Forgets the tokens past `length` of every sequence (or past each its own length). */
  truncate(length: number | ArrayLike<number>): void {
    const after = this.lengths.map((before, b) =>
      Math.min(before, Math.max(0, this.#perSequence('truncate', length, b))),
    )
    this.lengths.set(after)
  }

  /** The number that an argument has for a sequence. */
  #perSequence(method: string, argument: number | ArrayLike<number>, sequence: number): number {
    const all = typeof argument === 'number'
    const value = all ? argument : argument[sequence]
    if ((all || argument.length === this.batch) && !Number.isNaN(value)) return value
    const given = all ? `${argument}` : `[${Array.from(argument)}]`
    throw refused('E_ATTR', method, `${given} is no number, nor one for each of ${this.batch} sequences`)
  }

  /** Frees what it keeps on the device for coming steps. */
  dispose(): void {
    for (const step of this.#steps.values()) step.dispose()
    this.#steps.clear()
  }
}

/** Where `time` new tokens of each sequence go, on the device: uploaded once for all layers, and in place where the backend can, as recorded graphs need. */
export class CacheStep {
  /** Of the cache when this was made. */
  readonly layout: string
  /** Rows that the tokens take, `i32 [batch * time]`. */
  readonly index: Tensor
  /** Lengths once the tokens are in, `i32 [batch]`. */
  readonly lengths: Tensor
  /** Pages of each sequence, `i32 [batch, width]`, where rows lie in pages. */
  readonly pages: Tensor | undefined
  readonly #cache: SequenceCache
  readonly #time: number
  readonly #rotary = new Map<RotaryEmbedding, RotaryTables>()
  /** What is on the device. */
  #known: Numbers

  /** Use `SequenceCache.next`. @internal */
  constructor(cache: SequenceCache, time: number) {
    this.#cache = cache
    this.#time = time
    this.layout = cache.layout
    this.#known = this.#numbers()
    const upload = (data: Int32Array<ArrayBuffer>, shape: number[]) => keep(fromHost(data, shape, 'i32', cache.backend))
    const { index, lengths, pages } = this.#known
    this.index = upload(index, [index.length])
    this.lengths = upload(lengths, [lengths.length])
    this.pages = pages && upload(pages, [cache.batch, pages.length / cache.batch])
  }

  /** Rotation tables `[batch, time, R/2]` of the tokens' positions. */
  tables(rotary: RotaryEmbedding): RotaryTables {
    let tables = this.#rotary.get(rotary)
    if (tables === undefined) {
      tables = keep(
        rotary.at(this.#positions(this.#known.lengths), [this.#cache.batch, this.#time], this.index.backend),
      )
      this.#rotary.set(rotary, tables)
    }
    return tables
  }

  /** Follows the cache. */
  update(): void {
    const before = this.#known
    const now = this.#numbers()
    this.#known = now
    if (!same(before.index, now.index)) overwrite(this.index, now.index)
    if (this.pages && now.pages && !same(before.pages, now.pages)) overwrite(this.pages, now.pages)
    if (same(before.lengths, now.lengths)) return
    overwrite(this.lengths, now.lengths)
    const positions = this.#positions(now.lengths)
    for (const [rotary, { cos, sin }] of this.#rotary) {
      const angles = rotary.angles(positions)
      overwrite(cos, angles.cos)
      overwrite(sin, angles.sin)
    }
  }

  /** Position of each token, row-major `[batch, time]`, of sequences that are as long once they are in. */
  #positions(lengths: Int32Array): Int32Array<ArrayBuffer> {
    const time = this.#time
    return Int32Array.from(
      { length: lengths.length * time },
      (_, i) => lengths[Math.floor(i / time)] - time + (i % time),
    )
  }

  #numbers(): Numbers {
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
    for (const { cos, sin } of this.#rotary.values()) {
      cos.dispose()
      sin.dispose()
    }
  }
}

interface Numbers {
  readonly index: Int32Array<ArrayBuffer>
  readonly lengths: Int32Array<ArrayBuffer>
  readonly pages: Int32Array<ArrayBuffer> | undefined
}

const same = (a: Int32Array | undefined, b: Int32Array): boolean =>
  a?.length === b.length && a.every((x, i) => x === b[i])

/** Other elements for a tensor that nobody records: in place where the backend can, otherwise in new memory. */
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

/** Refuses an input of more or fewer sequences than the cache has. @throws MoeError E_SHAPE */
export function needSequences(op: string, { shape }: Tensor, cache: SequenceCache): void {
  const [batch] = shape
  if (batch === cache.batch) return
  throw new MoeError({
    code: 'E_SHAPE',
    op,
    problem: `the input has ${batch} sequences, the cache ${cache.batch}`,
    fix: `make the cache with batch: ${batch}, or pass the tokens of all its sequences`,
    details: { input: batch, cache: cache.batch },
  })
}
