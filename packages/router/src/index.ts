/** @file Public interface of @moe/router. */
export { type BiasUpdateOptions, sequenceBalanceLoss, updateBias } from './balance.ts'
export { type RouterConfig, routerAttrs } from './config.ts'
export { Experts } from './experts.ts'
export { Gate } from './gate.ts'
export { LoadCounter, type LoadSummary, summarizeLoad } from './load.ts'
export { type MoEForwardOptions, MoELayer } from './moe-layer.ts'
