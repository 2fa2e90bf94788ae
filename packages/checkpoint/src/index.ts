/** @file `@moe/checkpoint`: safetensors in and out, single and sharded, in the Hugging Face layout. */

export { type Conversion, type ConvertOptions, convertCheckpoint } from './convert-checkpoint.ts'
export { DEFAULT_BLOCK, dequantizeFp8Blocks } from './fp8-blocks.ts'
export { type OpenOptions, openCheckpoint } from './open-checkpoint.ts'
export { isScaleKey, type ReadF32Options, readF32 } from './read-f32.ts'
export {
  type ReadOptions,
  readSafetensors,
  SafetensorsFile,
  type StoredTensor,
  type TensorInfo,
  type TensorSource,
} from './read-safetensors.ts'
export { type SavedCheckpoint, type SaveOptions, saveCheckpoint } from './save-checkpoint.ts'
export { stateSource } from './state-source.ts'
export type { StoredArray, StoredDType } from './stored-dtype.ts'
export { fromF32, toF32 } from './to-f32.ts'
export { type TensorEntry, type WriteOptions, writeSafetensors } from './write-safetensors.ts'
