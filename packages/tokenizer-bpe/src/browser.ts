/** @file The package in browsers: code for rare pre-tokenizers stays behind an import(). */
export type { AddedToken } from './added-tokens.ts'
export type { DecodeStream } from './decode-stream.ts'
export { TokenizerError, type TokenizerErrorCode } from './errors.ts'
export type { PreTokenizerName } from './pre-tokenizers.ts'
export {
  BpeTokenizer,
  type DecodeOptions,
  type EncodeOptions,
  type EncodingWithOffsets,
  type TiktokenOptions,
} from './tokenizer.ts'
export { type SpecialToken, type TrainOptions, type TrainProgress, trainBpe, trainBpeAsync } from './train/train.ts'
