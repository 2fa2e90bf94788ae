/** @file Public interface of @moe/mtp. */
export { type MtpLoss, mtpLoss } from './loss.ts'
export { type Block, type MtpConfig, MtpModule, type MtpModuleOptions } from './mtp.ts'
export { type ShiftedTokens, shiftTokens, type TokenRows } from './targets.ts'
