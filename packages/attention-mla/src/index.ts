/** @file Public interface of @moe/attention-mla. */
export { type CacheCost, type CacheDType, type CacheOptions, cacheCost, KvCache, LatentCache } from './cache.ts'
export type { MlaConfig, RopeScaling } from './config.ts'
export { type MhaConfig, type MhaForwardOptions, type MhaOptions, MultiHeadAttention } from './mha.ts'
export { type MlaForwardOptions, type MlaOptions, MultiHeadLatentAttention } from './mla.ts'
export {
  RotaryEmbedding,
  type RotaryTables,
  rotaryAmplitude,
  rotaryFrequencies,
  softmaxScale,
  yarnMscale,
} from './rotary.ts'
