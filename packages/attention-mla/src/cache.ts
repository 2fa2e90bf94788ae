/**
 * @file Caches of earlier tokens. The latent cache holds per token and layer the normalized latent and the roped key that all heads share, and
 * nothing else; multi-head attention keeps its keys and values.
 */
import {
  type Backend,
  checkOptions,
  checkShared,
  concat,
  defaultBackend,
  dtypeBytes,
  type ErrorCode,
  fromHost,
  type HostArray,
  keep,
  MoeError,
  type OptionNames,
  scope,
  setRows,
  type Tensor,
  zeros,
} from '@moe/core'
import { type MlaConfig, mlaNames } from './config.ts'
import type { RotaryEmbedding, RotaryTables } from './rotary.ts'

/** What one more token costs in all layers of a model: in the latent cache, and if keys and values were kept expanded. */
export interface CacheCost {
  readonly elements: number
  readonly bytes: number
  /** Bytes of the expanded keys `[heads, nope + rope]` and values `[heads, v]`. */
  readonly expandedBytes: number
}

/** What a cache holds. bf16 takes half the memory, as published figures do; attention over it is computed as ever. */
export type CacheDType = 'f32' | 'bf16'

const cacheDTypes: readonly CacheDType[] = ['f32', 'bf16']

type LatentSizes = Pick<MlaConfig, 'kv_lora_rank' | 'qk_rope_head_dim'>

/** Elements per token and layer of a latent cache. */
function latentFeatures(op: string, config: LatentSizes): number {
  checkShared<Partial<MlaConfig>>(op, config, mlaNames)
  return config.kv_lora_rank + config.qk_rope_head_dim
}

/** The cost of a token by configuration alone. */
export function cacheCost(config: MlaConfig, layers: number, dtype: CacheDType = 'f32'): CacheCost {
  const elements = layers * latentFeatures('cacheCost', config)
  const { qk_rope_head_dim, qk_nope_head_dim, v_head_dim, num_attention_heads: heads } = config
  const expanded = layers * heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
  return { elements, bytes: elements * dtypeBytes[dtype], expandedBytes: expanded * dtypeBytes[dtype] }
}

export interface CacheOptions {
  readonly layers: number
  /** Sequences. Default 1. */
  readonly batch?: number
  /** Tokens per sequence that memory is taken for at first; it doubles when needed. Default 256. */
  readonly capacity?: number
  /** Default f32. bf16 needs a backend that has it. */
  readonly dtype?: CacheDType
  readonly backend?: Backend
}

const names: OptionNames<CacheOptions> = { layers: true, batch: true, capacity: true, dtype: true, backend: true }

/** Steps of prompts come once, those of decoding again and again. */
const longestKept = 16

const refused = (code: ErrorCode, method: string, problem: string, fix?: string): MoeError =>
  new MoeError({ code, op: `KvCache.${method}`, problem, fix })

/**
 * What attention needs of earlier tokens: `[batch, capacity, features]` per layer. Sequences have their own lengths; `truncate` takes
 * tokens back, as speculative decoding needs.
 */
export class KvCache {
  /** Elements per token and layer. */
  readonly features: number
  readonly batch: number
  readonly dtype: CacheDType
  /** Tokens in use of each sequence. */
  readonly lengths: Int32Array
  #capacity: number
  #layers: Tensor[]
  /** By number of new tokens. */
  readonly #steps = new Map<number, CacheStep>()

  constructor(features: number, options: CacheOptions) {
    checkOptions('KvCache', options, names)
    const { layers, batch = 1, capacity = 256, dtype = 'f32', backend = defaultBackend() } = options
    for (const [name, size] of Object.entries({ layers, batch, capacity })) {
      if (!Number.isInteger(size) || size < 1) {
        throw refused('E_CONFIG', 'new', `${name} = ${size} is not a positive integer`)
      }
    }
    if (!cacheDTypes.includes(dtype)) {
      throw refused(
        'E_CONFIG',
        'new',
        `dtype = ${JSON.stringify(dtype)} is none that a cache has`,
        "pass 'f32' or 'bf16'",
      )
    }
    this.features = features
    this.batch = batch
    this.dtype = dtype
    this.lengths = new Int32Array(batch)
    this.#capacity = capacity
    this.#layers = keep(scope(() => Array.from({ length: layers }, () => this.#empty(capacity, backend))))
  }

  get capacity(): number {
    return this.#capacity
  }

  /** Bytes that one more token costs over all layers: layers * features elements. */
  get bytesPerToken(): number {
    return this.#layers.length * this.features * dtypeBytes[this.dtype]
  }

  /** Bytes taken now. */
  get bytes(): number {
    return this.bytesPerToken * this.batch * this.#capacity
  }

  /** All rows of a layer, `[batch, capacity, features]` in the cache's dtype; those at or past a sequence's length mean nothing. */
  rows(layer: number): Tensor {
    const rows = this.#layers[layer]
    if (rows !== undefined) return rows
    if (this.#layers.length === 0) throw refused('E_DISPOSED', 'rows', 'the cache was disposed')
    throw refused(
      'E_ATTR',
      'rows',
      `there is no layer ${layer} of ${this.#layers.length}`,
      'make the cache with more layers',
    )
  }

  /** Where the next `time` tokens of each sequence go. It belongs to the cache and is the same object, brought up to date, as long as it fits. */
  next(time: number): CacheStep {
    let step = this.#steps.get(time)
    if (step !== undefined && step.capacity === this.#capacity) {
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
    const capacity = this.#capacity
    const { index } = this.next(time)
    const old = this.rows(layer)
    scope(() => {
      const source = rows
        .detach()
        .cast(this.dtype)
        .reshape([batch * time, features])
      // The reshape shares memory with `old`; once that is given up the rows are written in place.
      let flat = old.reshape([batch * capacity, features])
      old.dispose()
      try {
        flat = setRows(flat, index, source, { donate: true })
      } finally {
        // Where there was no memory for it, what was there stays.
        this.#layers[layer] = keep(flat.reshape([batch, capacity, features]))
      }
    })
  }

  /**
   * Counts `time` tokens, written in every layer, as part of each sequence (or of each its own number, 0 where nothing of it counts).
   * @throws MoeError E_ATTR for numbers that cannot have been written; no sequence is changed then.
   */
  advance(time: number | ArrayLike<number>): void {
    const after = this.lengths.map((length, b) => {
      const tokens = this.#perSequence('advance', time, b)
      if (Number.isInteger(tokens) && tokens >= 0 && length + tokens <= this.#capacity) return length + tokens
      const room = `${length} tokens in room for ${this.#capacity}`
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

  /** Makes room for `time` more tokens of each sequence; `write` does it by itself. */
  reserve(time: number): void {
    const tokens = Math.max(...this.lengths) + time
    if (tokens > this.#capacity) this.#grow(tokens)
  }

  #empty(tokens: number, backend: Backend): Tensor {
    return scope(() => zeros([this.batch, tokens, this.features], { backend }).cast(this.dtype))
  }

  #grow(tokens: number): void {
    let capacity = this.#capacity
    while (capacity < tokens) capacity *= 2
    // One by one: where memory ends, those that have grown stay, and another try goes on with the others.
    for (const [layer, old] of this.#layers.entries()) {
      const more = capacity - old.shape[1]
      if (more === 0) continue
      this.#layers[layer] = keep(scope(() => concat([old, this.#empty(more, old.backend)], 1)))
      old.dispose()
    }
    this.#capacity = capacity
  }

  dispose(): void {
    for (const layer of this.#layers) layer.dispose()
    this.#layers = []
    for (const step of this.#steps.values()) step.dispose()
    this.#steps.clear()
  }
}

/** Where `time` new tokens of each sequence go, on the device: uploaded once for all layers, and in place where the backend can, as recorded graphs need. */
export class CacheStep {
  /** Of the cache when this was made. */
  readonly capacity: number
  /** Rows of the flattened cache, `i32 [batch * time]`. */
  readonly index: Tensor
  /** Lengths once the tokens are in, `i32 [batch]`. */
  readonly lengths: Tensor
  readonly #cache: KvCache
  readonly #time: number
  readonly #rotary = new Map<RotaryEmbedding, RotaryTables>()
  #before: Int32Array

  /** Use `KvCache.next`. */
  constructor(cache: KvCache, time: number) {
    this.#cache = cache
    this.#time = time
    this.capacity = cache.capacity
    this.#before = cache.lengths.slice()
    const { backend } = cache.rows(0)
    const { index, after } = this.#numbers()
    this.index = keep(fromHost(index, [index.length], 'i32', backend))
    this.lengths = keep(fromHost(after, [after.length], 'i32', backend))
  }

  /** Rotation tables `[batch, time, R/2]` of the tokens' positions. */
  tables(rotary: RotaryEmbedding): RotaryTables {
    let tables = this.#rotary.get(rotary)
    if (tables === undefined) {
      tables = keep(rotary.at(this.#positions(), [this.#cache.batch, this.#time], this.index.backend))
      this.#rotary.set(rotary, tables)
    }
    return tables
  }

  /** Follows the cache's lengths. */
  update(): void {
    const { lengths } = this.#cache
    if (this.#before.every((length, b) => length === lengths[b])) return
    this.#before = lengths.slice()
    const { index, after } = this.#numbers()
    overwrite(this.index, index)
    overwrite(this.lengths, after)
    const positions = this.#positions()
    for (const [rotary, { cos, sin }] of this.#rotary) {
      const now = rotary.angles(positions)
      overwrite(cos, now.cos)
      overwrite(sin, now.sin)
    }
  }

  /** Position of each token, row-major `[batch, time]`. */
  #positions(): Int32Array {
    const time = this.#time
    return Int32Array.from(
      { length: this.#before.length * time },
      (_, i) => this.#before[Math.floor(i / time)] + (i % time),
    )
  }

  #numbers() {
    const time = this.#time
    const index = this.#positions().map((position, i) => Math.floor(i / time) * this.capacity + position)
    return { index, after: this.#before.map(length => length + time) }
  }

  dispose(): void {
    this.index.dispose()
    this.lengths.dispose()
    for (const { cos, sin } of this.#rotary.values()) {
      cos.dispose()
      sin.dispose()
    }
  }
}

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

/** Keys and values in compressed form: kv_lora_rank + qk_rope_head_dim elements per token and layer. */
export class LatentCache extends KvCache {
  constructor(config: LatentSizes, options: CacheOptions) {
    super(latentFeatures('LatentCache', config), options)
  }
}
