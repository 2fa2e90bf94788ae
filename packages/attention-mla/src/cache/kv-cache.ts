/**
 * @file Caches with separate memory for each sequence. Per token and layer, the latent cache stores only the normalized
 * latent and the rotated key that all heads share; multi-head attention stores its keys and values.
 */
import { checkOptions, checkShared, defaultBackend, dtypeBytes, type OptionNames, type Tensor } from '@moe/core'
import { type MlaConfig, mlaNames } from '../config.ts'
import {
  type CacheDType,
  type CacheFeatures,
  type CacheMemoryOptions,
  CacheRows,
  cacheFeaturesOf,
  checkSizes,
  memoryNames,
  type RowKind,
} from './cache-rows.ts'
import { SequenceCache } from './sequence-cache.ts'

/** Memory per token over all layers of a model, for the latent cache and for expanded keys and values. */
export interface CacheCost {
  /** Elements in the latent cache. */
  readonly elements: number
  /** Bytes in the latent cache, in the cache's dtype. */
  readonly bytes: number
  /** Bytes of the expanded keys `[heads, nope + rope]` and values `[heads, v]`. */
  readonly expandedBytes: number
}

/** The part of a configuration that determines the size of the rows of a latent cache. */
export type LatentSizes = Pick<MlaConfig, 'kv_lora_rank' | 'qk_rope_head_dim' | 'index_topk' | 'index_head_dim'>

/** Returns the sizes of the rows of a latent cache: the latent with the rope key, and the key of the indexer. */
export function latentFeatures(op: string, config: LatentSizes): CacheFeatures {
  checkShared<Partial<MlaConfig>>(op, config, mlaNames)
  const { kv_lora_rank, qk_rope_head_dim, index_topk, index_head_dim } = config
  return { attention: kv_lora_rank + qk_rope_head_dim, index: index_topk == null ? 0 : (index_head_dim ?? 0) }
}

/** Computes the cache memory per token from a configuration, without creating a cache. `dtype` defaults to f32. */
export function cacheCost(config: MlaConfig, layers: number, dtype: CacheDType = 'f32'): CacheCost {
  const features = latentFeatures('cacheCost', config)
  const elements = layers * (features.attention + features.index)
  const { qk_rope_head_dim, qk_nope_head_dim, v_head_dim, num_attention_heads: heads } = config
  const expanded = layers * heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
  return { elements, bytes: elements * dtypeBytes[dtype], expandedBytes: expanded * dtypeBytes[dtype] }
}

/** Options of a cache with separate memory for each sequence. */
export interface CacheOptions extends CacheMemoryOptions {
  /** Number of sequences. Default 1. */
  readonly batch?: number | undefined
  /** Initial number of tokens per sequence that memory is allocated for. It doubles when needed. Default 256. */
  readonly capacity?: number | undefined
}

const names: OptionNames<CacheOptions> = { ...memoryNames, batch: true, capacity: true }

/** A cache with rows `[batch, capacity, features]` per layer. */
export class KvCache extends SequenceCache {
  #capacity: number

  /**
   * Allocates the cache.
   * @param features elements per token and layer: `cacheFeatures` of the attention. A number stands for rows that
   * attention reads, without those of an indexer.
   * @throws MoeError E_CONFIG for sizes that are not positive integers, or an unsupported dtype
   */
  constructor(features: number | CacheFeatures, options: CacheOptions) {
    checkOptions(new.target.name, options, names)
    const { layers, indexLayers, batch = 1, capacity = 256, dtype = 'f32', backend = defaultBackend() } = options
    checkSizes({ layers, batch, capacity }, dtype)
    const shape = { blocks: batch, perBlock: capacity, features: cacheFeaturesOf(features) }
    super(batch, new CacheRows(shape, { layers, indexLayers, dtype, backend }))
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

  /** Bytes per token over all layers, including the keys of indexers. */
  get bytesPerToken(): number {
    return this.memory.bytesPerToken
  }

  /** Bytes currently allocated. */
  get bytes(): number {
    return this.bytesPerToken * this.batch * this.#capacity
  }

  rowOf(sequence: number, position: number): number {
    return sequence * this.#capacity + position
  }

  first(layer: number, time: number, kind?: RowKind): Tensor {
    return this.rows(layer, kind).narrow(1, 0, time)
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

/**
 * A cache of compressed keys and values: kv_lora_rank + qk_rope_head_dim elements per token and layer, and
 * index_head_dim more with sparse attention.
 */
export class LatentCache extends KvCache {
  /** Allocates the cache, with rows of the size that the configuration determines. @throws MoeError E_CONFIG */
  constructor(config: LatentSizes, options: CacheOptions) {
    super(latentFeatures('LatentCache', config), options)
  }
}
