/** @file Public interface of @moe/router. */
export {
  type BiasUpdateOptions,
  communicationBalanceLoss,
  deviceBalanceLoss,
  expertBalanceLoss,
  type RoutingPass,
  sequenceBalanceLoss,
  updateBias,
} from './balance.ts'
export {
  auxFree,
  type Balancer,
  combineBalancers,
  communication,
  deviceLevel,
  expertLevel,
  noBalance,
  type Scheduled,
  scheduled,
  sequenceWise,
} from './balancer.ts'
export { type CapacityForwardOptions, CapacityMoE, type CapacityMoEConfig, withinCapacity } from './capacity-moe.ts'
export { type RouterConfig, routerAttrs } from './config.ts'
export { type ClusterShape, type ExpertPlacement, gpuImbalance, placeExperts } from './eplb.ts'
export { Experts } from './experts.ts'
export { Gate } from './gate.ts'
export { type LayerLoad, LoadCounter, type LoadSummary, maskedCounts, summarizeLoad } from './load.ts'
export { type Choice, type MoEForwardOptions, MoELayer, type MoELayerOptions } from './moe-layer.ts'
export { type LayerReport, LoadMonitor, type LoadMonitorOptions, type Verdict } from './monitor.ts'
export { type DroppingPass, type TokenDropping, withinDeviceBudget } from './token-dropping.ts'
