/** @file Entry point in browsers. Code that only some tokenizers need is loaded with import() (features.ts). */
export type { AddedToken } from './added-tokens.ts'
export type { DecodeStream } from './decode-stream.ts'
export { TokenizerError, type TokenizerErrorCode, type TokenizerErrorInfo } from './errors.ts'
export type { DecodeOptions, EncodeOptions } from './options.ts'
export type { PreTokenizerName } from './pre-tokenizers.ts'
export type { TiktokenOptions } from './tiktoken.ts'
export { BpeTokenizer, type EncodingWithOffsets } from './tokenizer.ts'
export { type SpecialToken, type TrainBpeOptions, type TrainProgress, trainBpe, trainBpeAsync } from './train/train.ts'
