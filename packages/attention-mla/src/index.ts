/** @file Public interface of @moe/attention-mla. */
export { type CacheCost, type CacheDType, cacheCost, LatentCache, type LatentCacheOptions } from './cache.ts'
export type { MlaConfig, RopeScaling } from './config.ts'
export { type MlaForwardOptions, type MlaOptions, MultiHeadLatentAttention } from './mla.ts'
export {
  RotaryEmbedding,
  type RotaryTables,
  rotaryAmplitude,
  rotaryFrequencies,
  softmaxScale,
  yarnMscale,
} from './rotary.ts'
