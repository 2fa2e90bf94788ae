/** @file Public interface of @moe/attention-mla. */
export type { CacheDType, CacheFeatures, CacheMemoryOptions, RowKind } from './cache/cache-rows.ts'
export {
  type CacheCost,
  type CacheOptions,
  cacheCost,
  KvCache,
  LatentCache,
  type LatentSizes,
} from './cache/kv-cache.ts'
export { PagedBatch, PagedCache, type PagedCacheOptions, PagedSequence } from './cache/paged-cache.ts'
export type { CacheStep, SequenceCache } from './cache/sequence-cache.ts'
export type { MlaConfig, RopeScaling } from './config.ts'
export { LayerNorm } from './layer-norm.ts'
export { type IndexQueries, LightningIndexer } from './lightning-indexer.ts'
export { type MhaConfig, type MhaForwardOptions, type MhaOptions, MultiHeadAttention } from './mha.ts'
export { type MlaForwardOptions, type MlaOptions, MultiHeadLatentAttention } from './mla.ts'
export {
  type RotaryAngles,
  RotaryEmbedding,
  type RotaryTables,
  rotaryAmplitude,
  rotaryFrequencies,
  softmaxScale,
  yarnMscale,
} from './rotary.ts'
