/** @file Opens checkpoints in the Hugging Face layout: one safetensors file, or shards with an index. */

import { checkOptions } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import { type Folder, type FolderOptions, folderOptionNames, type OpenFile } from './folder.ts'
import { type CheckpointLocation, locate, openFile } from './locations.ts'
import {
  missingTensor,
  readAll,
  readFrom,
  type SafetensorsFile,
  type StoredTensor,
  type TensorInfo,
  type TensorSource,
} from './read-safetensors.ts'
import { parseStrictJson } from './strict-json.ts'

/** File name of a checkpoint that is not sharded. */
export const SINGLE_FILE = 'model.safetensors'
/** File name of the index of a sharded checkpoint. */
export const INDEX_FILE = 'model.safetensors.index.json'

const MAX_INDEX_BYTES = 64 * 2 ** 20

/** Options of {@link openCheckpoint}. */
export interface OpenOptions extends FolderOptions {
  /** Maximum header size of each file in bytes. Default 32 MiB, enough for about 200,000 tensors. */
  readonly maxHeaderBytes?: number | undefined
}

/**
 * Opens a safetensors file, a folder with `model.safetensors`, or a folder (or index file) with `model.safetensors.index.json` and its
 * shards. If a folder contains both, the single file is used, as in transformers. All headers are read and validated; tensors are read
 * later. One file descriptor per shard stays open until you close the checkpoint.
 *
 * The location can be a path, a URL, `File` objects, or a folder handle of a browser. A URL that ends in `.safetensors` or `.json` refers to
 * a file, any other to a folder. From the web, data is requested in blocks, and up to 64 MiB of them are cached.
 *
 * @throws {MoeError} `E_CHECKPOINT`, naming the file and the problem, as {@link readSafetensors}. Also for an index that names files
 *   outside the folder, a shard that is a link out of it, tensors that are missing, duplicated or not in the index, and invalid or
 *   unexpected HTTP responses. `E_ABORTED` when cancelled
 *
 * @example
 * ```ts no-run
 * const checkpoint = await openCheckpoint('https://huggingface.co/ORG/MODEL/resolve/main/')
 * ```
 */
export async function openCheckpoint(location: CheckpointLocation, options: OpenOptions = {}): Promise<TensorSource> {
  checkOptions('openCheckpoint', options, { ...folderOptionNames, maxHeaderBytes: true })
  const { folder, file } = await locate('openCheckpoint', location, options)
  if (file === undefined) return openInFolder(folder, options.maxHeaderBytes)
  if (file.endsWith('.json')) return openShards(folder, await openIn(folder, file), options.maxHeaderBytes)
  // Without a root, a file that the caller names may be a link to anywhere.
  const opened =
    options.root === undefined
      ? await openFile('openCheckpoint', location as string | URL, options)
      : await openIn(folder, file)
  return readFrom(opened, options.maxHeaderBytes)
}

/** Opens a file in a folder. @throws MoeError E_CHECKPOINT if it does not exist */
async function openIn(folder: Folder, name: string): Promise<OpenFile> {
  const file = await folder.open(name)
  if (!file) throw checkpointError(folder.pathOf(name), 'opening failed: no such file', undefined, { shard: name })
  return file
}

/** Opens the checkpoint in a folder. @internal */
export async function openInFolder(folder: Folder, maxHeaderBytes?: number): Promise<TensorSource> {
  const single = await folder.open(SINGLE_FILE)
  if (single) return readFrom(single, maxHeaderBytes)
  const index = await folder.open(INDEX_FILE)
  if (index) return openShards(folder, index, maxHeaderBytes)
  throw checkpointError(
    folder.path,
    `the folder has neither ${SINGLE_FILE} nor ${INDEX_FILE}`,
    'pass a folder that contains a checkpoint',
  )
}

async function openShards(folder: Folder, indexFile: OpenFile, maxHeaderBytes?: number): Promise<TensorSource> {
  const index = await readIndex(indexFile)
  const shards = new Map<string, SafetensorsFile>()
  try {
    for (const name of new Set(index.weightMap.values())) {
      shards.set(name, await readFrom(await openIn(folder, name), maxHeaderBytes))
    }
    checkShards(indexFile.path, index, shards)
    return new ShardedCheckpoint(folder.path, index, shards)
  } catch (error) {
    for (const shard of shards.values()) await shard.close()
    throw error
  }
}

interface CheckpointIndex {
  /** The file name of each tensor. */
  readonly weightMap: ReadonlyMap<string, string>
  readonly metadata: Readonly<Record<string, string>>
}

/** Reads the index of a sharded checkpoint, checks that every shard is a plain file name, and closes the file. */
export async function readIndex(file: OpenFile): Promise<CheckpointIndex> {
  const { path } = file
  let document: unknown
  try {
    document = parseStrictJson(withoutMark(await readAll(file, MAX_INDEX_BYTES)), 8)
  } catch (cause) {
    if (!(cause instanceof SyntaxError)) throw cause
    throw checkpointError(path, `the index is invalid: ${cause.message}`, undefined, {}, cause)
  }
  const { weight_map: weightMap, metadata } = (document ?? {}) as Record<string, unknown>
  if (typeof weightMap !== 'object' || weightMap === null || Array.isArray(weightMap)) {
    throw checkpointError(path, 'the index has no "weight_map" object')
  }
  for (const [key, name] of Object.entries(weightMap)) {
    if (typeof name !== 'string' || !isPlainFileName(name)) {
      throw checkpointError(
        path,
        `the index assigns tensor ${shown(key)} to ${shown(name)}`,
        'shards must be plain file names in the same folder',
        { key, shard: name },
      )
    }
  }
  const entries = Object.entries(metadata && typeof metadata === 'object' ? metadata : {})
  return {
    weightMap: new Map(Object.entries(weightMap as Record<string, string>)),
    metadata: Object.fromEntries(
      entries.map(([key, value]) => [key, typeof value === 'string' ? value : JSON.stringify(value)]),
    ),
  }
}

/** Removes the byte order mark that some editors write. */
const withoutMark = (bytes: Uint8Array): Uint8Array =>
  bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf ? bytes.subarray(3) : bytes

function isPlainFileName(name: string): boolean {
  // A colon could end a drive letter.
  return name !== '' && name !== '.' && name !== '..' && !/[/\\:\0]/.test(name)
}

/** Checks that index and shards agree in both directions. Otherwise unintended weights could be loaded. */
function checkShards(
  indexPath: string,
  { weightMap }: CheckpointIndex,
  shards: ReadonlyMap<string, SafetensorsFile>,
): void {
  for (const [key, name] of weightMap) {
    if (!shards.get(name)!.has(key)) {
      throw checkpointError(indexPath, `tensor ${shown(key)} is missing in ${name}`, undefined, {
        key,
        shard: name,
      })
    }
  }
  for (const [name, shard] of shards) {
    for (const key of shard.keys()) {
      const owner = weightMap.get(key)
      if (owner === name) continue
      const where = owner === undefined ? 'the index does not contain it' : `the index assigns it to ${owner}`
      throw checkpointError(shard.path, `contains tensor ${shown(key)}, but ${where}`, undefined, { key, shard: name })
    }
  }
}

/** A checkpoint of several files, returned by {@link openCheckpoint}. */
class ShardedCheckpoint implements TensorSource {
  readonly path: string
  readonly metadata: Readonly<Record<string, string>>
  readonly #index: CheckpointIndex
  readonly #shards: ReadonlyMap<string, SafetensorsFile>

  constructor(path: string, index: CheckpointIndex, shards: ReadonlyMap<string, SafetensorsFile>) {
    this.path = path
    this.metadata = index.metadata
    this.#index = index
    this.#shards = shards
  }

  keys(): string[] {
    return [...this.#shards.values()].flatMap(shard => shard.keys())
  }

  has(key: string): boolean {
    return this.#index.weightMap.has(key)
  }

  info(key: string): TensorInfo {
    return this.#shard(key).info(key)
  }

  async read(key: string): Promise<StoredTensor> {
    return this.#shard(key).read(key)
  }

  async close(): Promise<void> {
    for (const shard of this.#shards.values()) await shard.close()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #shard(key: string): SafetensorsFile {
    const name = this.#index.weightMap.get(key)
    if (name === undefined) throw missingTensor(this.path, key, this.#index.weightMap.keys())
    return this.#shards.get(name)!
  }
}
