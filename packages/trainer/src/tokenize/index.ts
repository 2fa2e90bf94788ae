/** @file Public API of @moe/trainer/tokenize. */
export type { FimTokens } from './encoding.ts'
export { type TokenizeOptions, type TokenizeProgress, type TokenizeResult, tokenize } from './tokenize.ts'
