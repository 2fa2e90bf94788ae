/** @file Public interface of @moe/trainer/tokenize. */
export { type TokenizeOptions, type TokenizeProgress, type TokenizeResult, tokenize } from './tokenize.ts'
