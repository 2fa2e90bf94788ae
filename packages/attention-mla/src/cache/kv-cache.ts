/**
 * @file Caches with room of its own for each sequence. The latent cache holds per token and layer the normalized latent and the roped key that all heads
 * share, and nothing else; multi-head attention keeps its keys and values.
 */
import { checkOptions, checkShared, defaultBackend, dtypeBytes, type OptionNames, type Tensor } from '@moe/core'
import { type MlaConfig, mlaNames } from '../config.ts'
import { type CacheDType, type CacheMemoryOptions, CacheRows, checkSizes, memoryNames } from './cache-rows.ts'
import { SequenceCache } from './sequence-cache.ts'

/** What one more token costs in all layers of a model: in the latent cache, and if keys and values were kept expanded. */
export interface CacheCost {
  /** Numbers that the latent cache holds. */
  readonly elements: number
  /** Bytes of these in the cache's dtype. */
  readonly bytes: number
  /** Bytes of the expanded keys `[heads, nope + rope]` and values `[heads, v]`. */
  readonly expandedBytes: number
}

/** What of a configuration says how wide a row of the latent cache is. */
export type LatentSizes = Pick<MlaConfig, 'kv_lora_rank' | 'qk_rope_head_dim'>

/** Elements per token and layer of a latent cache. */
export function latentFeatures(op: string, config: LatentSizes): number {
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

/** Room, layers and dtype of a cache in which each sequence has memory of its own. */
export interface CacheOptions extends CacheMemoryOptions {
  /** Sequences. Default 1. */
  readonly batch?: number
  /** Tokens per sequence that memory is taken for at first; it doubles when needed. Default 256. */
  readonly capacity?: number
}

const names: OptionNames<CacheOptions> = { ...memoryNames, batch: true, capacity: true }

/** Rows `[batch, capacity, features]` per layer. */
export class KvCache extends SequenceCache {
  #capacity: number

  /**
   * @param features elements per token and layer: `cacheFeatures` of the attention. @throws MoeError E_CONFIG for sizes that are no positive
   * integers, or a dtype that a cache cannot have
   */
  constructor(features: number, options: CacheOptions) {
    checkOptions(new.target.name, options, names)
    const { layers, batch = 1, capacity = 256, dtype = 'f32', backend = defaultBackend() } = options
    checkSizes({ layers, batch, capacity }, dtype)
    super(batch, new CacheRows({ blocks: batch, perBlock: capacity, features }, { layers, dtype, backend }))
    this.#capacity = capacity
  }

  get capacity(): number {
    return this.#capacity
  }

  get layout(): string {
    return `${this.#capacity}`
  }

  get pageTable(): null {
    return null
  }

  /** Bytes that one more token costs over all layers: layers * features elements. */
  get bytesPerToken(): number {
    return this.memory.layers * this.features * dtypeBytes[this.dtype]
  }

  /** Bytes taken now. */
  get bytes(): number {
    return this.bytesPerToken * this.batch * this.#capacity
  }

  rowOf(sequence: number, position: number): number {
    return sequence * this.#capacity + position
  }

  first(layer: number, time: number): Tensor {
    return this.rows(layer).narrow(1, 0, time)
  }

  reserve(time: number): void {
    const tokens = Math.max(...this.lengths) + time
    let capacity = this.#capacity
    while (capacity < tokens) capacity *= 2
    if (capacity === this.#capacity) return
    this.memory.grow({ blocks: this.batch, perBlock: capacity })
    this.#capacity = capacity
  }

  /** Frees the rows of all layers. */
  override dispose(): void {
    super.dispose()
    this.memory.dispose()
  }
}

/** Keys and values in compressed form: kv_lora_rank + qk_rope_head_dim elements per token and layer. */
export class LatentCache extends KvCache {
  /** Takes the width of a row from the configuration. @throws MoeError E_CONFIG */
  constructor(config: LatentSizes, options: CacheOptions) {
    super(latentFeatures('LatentCache', config), options)
  }
}
