/** @file Public interface of @moe/mtp. */
export { type MtpAcceptance, mtpAcceptance } from './acceptance.ts'
export { type DepthOptions, type MtpLoss, type MtpLossOptions, mtpDepthLoss, mtpLoss } from './loss.ts'
export { type Block, type MtpConfig, MtpModule, type MtpModuleOptions, type SharedHead } from './mtp.ts'
export {
  type DepthTargets,
  type DepthTensors,
  depthTargets,
  idsAhead,
  inverseCountAt,
  inverseCountsOf,
  type ShiftedTokens,
  shiftTokens,
  type TokenRows,
  targetsAt,
  uploadTargets,
} from './targets.ts'
