/**
 * @file Caches of earlier tokens. The latent cache holds per token and layer the normalized latent and the roped key that all heads share, and
 * nothing else; multi-head attention keeps its keys and values.
 */
import {
  type Backend,
  concat,
  defaultBackend,
  dtypeBytes,
  fromHost,
  keep,
  MoeError,
  scope,
  setRows,
  type Tensor,
  zeros,
} from '@moe/core'
import type { MlaConfig } from './config.ts'

/** What one more token costs in all layers of a model: in the latent cache, and if keys and values were kept expanded. */
export interface CacheCost {
  readonly elements: number
  readonly bytes: number
  /** Bytes of the expanded keys `[heads, nope + rope]` and values `[heads, v]`. */
  readonly expandedBytes: number
}

/** What a cache holds. bf16 takes half the memory, as published figures do; attention over it is computed as ever. */
export type CacheDType = 'f32' | 'bf16'

/** The cost of a token by configuration alone. */
export function cacheCost(config: MlaConfig, layers: number, dtype: CacheDType = 'f32'): CacheCost {
  const { kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim, num_attention_heads: heads } = config
  const elements = layers * (kv_lora_rank + qk_rope_head_dim)
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

  constructor(features: number, options: CacheOptions) {
    const { layers, batch = 1, capacity = 256, dtype = 'f32', backend = defaultBackend() } = options
    this.features = features
    this.batch = batch
    this.dtype = dtype
    this.lengths = new Int32Array(batch)
    this.#capacity = capacity
    this.#layers = Array.from({ length: layers }, () => this.#empty(capacity, backend))
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
    return this.#layers[layer]
  }

  /** Positions `[batch, time]` that the next `time` tokens of each sequence have. */
  positions(time: number): Int32Array {
    const out = new Int32Array(this.batch * time)
    for (let b = 0; b < this.batch; b++) for (let t = 0; t < time; t++) out[b * time + t] = this.lengths[b] + t
    return out
  }

  /** `i32 [batch]`: lengths once `time` more tokens are in. */
  lengthsAfter(time: number, backend: Backend): Tensor {
    return fromHost(
      this.lengths.map(length => length + time),
      [this.batch],
      'i32',
      backend,
    )
  }

  /** Writes the next rows `[batch, time, features]`, rounded to the cache's dtype, of a layer behind each sequence. Call `advance` once all layers have written. */
  write(layer: number, rows: Tensor): void {
    const [batch, time, features] = rows.shape
    if (batch !== this.batch || features !== this.features) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'KvCache.write',
        problem: `rows [${rows.shape}] do not fit a cache of ${this.batch} sequences with ${this.features} features`,
      })
    }
    this.#reserve(Math.max(...this.lengths) + time)
    const capacity = this.#capacity
    const at = new Int32Array(batch * time)
    for (let b = 0; b < batch; b++) for (let t = 0; t < time; t++) at[b * time + t] = b * capacity + this.lengths[b] + t
    const old = this.#layers[layer]
    this.#layers[layer] = keep(
      scope(() => {
        const flat = old.reshape([batch * capacity, features])
        // The reshape shares memory with `old`; once that is given up the rows are written in place.
        old.dispose()
        const index = fromHost(at, [batch * time], 'i32', rows.backend)
        const next = setRows(
          flat,
          index,
          rows
            .detach()
            .cast(this.dtype)
            .reshape([batch * time, features]),
          { donate: true },
        )
        return next.reshape([batch, capacity, features])
      }),
    )
  }

  /** Counts `time` tokens, written in every layer, as part of each sequence (or of each its own number). */
  advance(time: number | ArrayLike<number>): void {
    for (let b = 0; b < this.batch; b++) this.lengths[b] += typeof time === 'number' ? time : time[b]
  }

  /** Forgets the tokens past `length` of every sequence (or past each its own length). */
  truncate(length: number | ArrayLike<number>): void {
    for (let b = 0; b < this.batch; b++) {
      const keepTokens = typeof length === 'number' ? length : length[b]
      this.lengths[b] = Math.min(this.lengths[b], Math.max(0, keepTokens))
    }
  }

  #empty(tokens: number, backend: Backend): Tensor {
    return keep(scope(() => zeros([this.batch, tokens, this.features], { backend }).cast(this.dtype)))
  }

  #reserve(tokens: number): void {
    if (tokens <= this.#capacity) return
    let capacity = this.#capacity
    while (capacity < tokens) capacity *= 2
    this.#layers = this.#layers.map(old =>
      keep(
        scope(() => {
          using more = this.#empty(capacity - this.#capacity, old.backend)
          const grown = concat([old, more], 1)
          old.dispose()
          return grown
        }),
      ),
    )
    this.#capacity = capacity
  }

  dispose(): void {
    for (const layer of this.#layers) layer.dispose()
    this.#layers = []
  }
}

/** Keys and values in compressed form: kv_lora_rank + qk_rope_head_dim elements per token and layer. */
export class LatentCache extends KvCache {
  constructor(config: Pick<MlaConfig, 'kv_lora_rank' | 'qk_rope_head_dim'>, options: CacheOptions) {
    super(config.kv_lora_rank + config.qk_rope_head_dim, options)
  }
}
