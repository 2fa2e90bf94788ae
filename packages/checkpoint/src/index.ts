/** @file `@moe/checkpoint`: reads and writes safetensors (single and sharded), GGUF, and LoRA adapters in PEFT's format. */

export { adapterBase, loadAdapters } from './adapters/load-adapters.ts'
export { type SaveAdaptersOptions, saveAdapters } from './adapters/save-adapters.ts'
export { type Conversion, type ConvertOptions, convertCheckpoint } from './convert-checkpoint.ts'
export { type DirectoryHandle, isDirectoryHandle, type WritableFile } from './directory-handle.ts'
export { flushFile, flushFolder } from './flush.ts'
export {
  type Fetch,
  type Folder,
  type FolderOptions,
  folderOptionNames,
  type OpenFile,
  type ReadProgress,
  type TargetFolder,
  writeText,
} from './folder.ts'
export { DEFAULT_BLOCK, dequantizeFp8Blocks } from './fp8-blocks.ts'
export { type GgufFile, type GgufTensorInfo, type ReadGgufOptions, readGguf } from './gguf/read-gguf.ts'
export type { GgufEncoding, GgufTensorType } from './gguf/tensor-type.ts'
export type { GgufArray, GgufNumberType, GgufValue } from './gguf/value.ts'
export {
  type GgufContents,
  type GgufProgress,
  type GgufTensor,
  type WriteGgufOptions,
  writeGguf,
} from './gguf/write-gguf.ts'
export {
  type CheckpointLocation,
  type FolderLocation,
  isDiskPath,
  openFolder,
  subfolder,
  targetFolder,
} from './locations.ts'
export type { NamedBlob, SlicedBytes } from './named-blobs.ts'
export { type OpenOptions, openCheckpoint, openInFolder } from './open-checkpoint.ts'
export { type Int4Source, type Int4Weight, unpackInt4 } from './packed-int4.ts'
export { pathOf } from './path-of.ts'
export { isScaleKey, type ReadF32Options, readF32, readFp8 } from './read-f32.ts'
export {
  type ReadOptions,
  readAll,
  readFrom,
  readSafetensors,
  SafetensorsFile,
  type StoredTensor,
  type TensorInfo,
  type TensorSource,
} from './read-safetensors.ts'
export { renameWithRetry, retryWhileBusy } from './rename-with-retry.ts'
export { type SavedCheckpoint, type SaveOptions, saveCheckpoint, saveCheckpointWithText } from './save-checkpoint.ts'
export { stateSource } from './state-source.ts'
export type { StoredArray, StoredDType } from './stored-dtype.ts'
export { fromF32, toF32 } from './to-f32.ts'
export { type TensorEntry, type WriteOptions, writeInFolder, writeSafetensors } from './write-safetensors.ts'
