/** @file A checkpoint as Hugging Face lays it out: one safetensors file, or shards and their index, under one interface. */

import { checkOptions } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import { type Folder, type FolderOptions, folderOptionNames, type OpenFile } from './folder.ts'
import { type CheckpointPlace, locate, openFile } from './places.ts'
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

/** The file of a checkpoint that is not sharded. */
export const SINGLE_FILE = 'model.safetensors'
/** The index of one that is. */
export const INDEX_FILE = 'model.safetensors.index.json'

const MAX_INDEX_BYTES = 64 * 2 ** 20

/** How files are read, where they may lie, and limits. */
export interface OpenOptions extends FolderOptions {
  /** Largest header to accept, in bytes. Default 32 MiB, room for about 200,000 tensors. */
  readonly maxHeaderBytes?: number
}

/**
 * Opens a safetensors file, a folder with `model.safetensors`, or a folder (or index file) with
 * `model.safetensors.index.json` and its shards, on the disk or by its address on the web. A folder with both is read as the single file, as
 * transformers does. Reads all headers, no tensors; keeps one file descriptor for each shard until closed. From the web comes what is read, in blocks; 64 MiB of them are kept.
 *
 * An address names a file if it ends in `.safetensors` or `.json`, else a folder.
 *
 * @throws {MoeError} `E_CHECKPOINT`, naming the file and the fault: besides those of {@link readSafetensors}, an index that
 *   names files outside the folder, a shard that is a link out of it, a tensor that is missing, or in two shards, or in none
 *   of the index; from the web an answer that is none, or not what was asked for. `E_ABORTED` when stopped
 *
 * @example
 * ```ts no-run
 * const checkpoint = await openCheckpoint('https://huggingface.co/ORG/MODEL/resolve/main/')
 * ```
 */
export async function openCheckpoint(place: CheckpointPlace, options: OpenOptions = {}): Promise<TensorSource> {
  checkOptions('openCheckpoint', options, { ...folderOptionNames, maxHeaderBytes: true })
  const { folder, file } = await locate('openCheckpoint', place, options)
  if (file === undefined) return openInFolder(folder, options.maxHeaderBytes)
  if (file.endsWith('.json')) return openSharded(folder, file, options.maxHeaderBytes)
  return readFrom(await openFile('openCheckpoint', place as string | URL, options), options.maxHeaderBytes)
}

/** The checkpoint in a folder that is open already. @internal */
export async function openInFolder(folder: Folder, maxHeaderBytes?: number): Promise<TensorSource> {
  const single = await folder.open(SINGLE_FILE)
  if (single) return readFrom(single, maxHeaderBytes)
  const index = await folder.open(INDEX_FILE)
  if (index) return openShards(folder, index, maxHeaderBytes)
  throw checkpointError(
    folder.path,
    `the folder has neither ${SINGLE_FILE} nor ${INDEX_FILE}`,
    'pass the folder of a checkpoint',
  )
}

async function openSharded(folder: Folder, name: string, maxHeaderBytes?: number): Promise<TensorSource> {
  const index = await folder.open(name)
  if (!index) throw checkpointError(folder.pathOf(name), 'there is no such file')
  return openShards(folder, index, maxHeaderBytes)
}

async function openShards(folder: Folder, indexFile: OpenFile, maxHeaderBytes?: number): Promise<TensorSource> {
  const index = await readIndex(indexFile)
  const shards = new Map<string, SafetensorsFile>()
  try {
    for (const name of new Set(index.weightMap.values())) {
      const file = await folder.open(name)
      if (!file) throw checkpointError(folder.pathOf(name), 'opening failed: no such file', undefined, { shard: name })
      shards.set(name, await readFrom(file, maxHeaderBytes))
    }
    checkShards(indexFile.path, index, shards)
    return new ShardedCheckpoint(folder.path, index, shards)
  } catch (error) {
    for (const shard of shards.values()) await shard.close()
    throw error
  }
}

interface CheckpointIndex {
  /** File name of each tensor. */
  readonly weightMap: ReadonlyMap<string, string>
  readonly metadata: Readonly<Record<string, string>>
}

/** The index of a sharded checkpoint, with every shard name checked to be a plain file name. The file is then closed. */
export async function readIndex(file: OpenFile): Promise<CheckpointIndex> {
  const { path } = file
  let document: unknown
  try {
    document = parseStrictJson(withoutMark(await readAll(file, MAX_INDEX_BYTES)), 8)
  } catch (cause) {
    if (!(cause instanceof SyntaxError)) throw cause
    throw checkpointError(path, `the index cannot be read: ${cause.message}`, undefined, {}, cause)
  }
  const { weight_map: weightMap, metadata } = (document ?? {}) as Record<string, unknown>
  if (typeof weightMap !== 'object' || weightMap === null || Array.isArray(weightMap)) {
    throw checkpointError(path, 'the index has no object "weight_map"')
  }
  for (const [key, name] of Object.entries(weightMap)) {
    if (typeof name !== 'string' || !isPlainFileName(name)) {
      throw checkpointError(
        path,
        `the index puts tensor ${shown(key)} into ${shown(name)}`,
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

/** Some editors begin UTF-8 with a byte order mark. */
const withoutMark = (bytes: Uint8Array): Uint8Array =>
  bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf ? bytes.subarray(3) : bytes

function isPlainFileName(name: string): boolean {
  // A colon is behind the letter of a drive.
  return name !== '' && name !== '.' && name !== '..' && !/[/\\:\0]/.test(name)
}

/** Index and shards must agree in both directions, or a reader could use weights that the writer did not mean. */
function checkShards(
  indexPath: string,
  { weightMap }: CheckpointIndex,
  shards: ReadonlyMap<string, SafetensorsFile>,
): void {
  for (const [key, name] of weightMap) {
    if (!shards.get(name)!.has(key)) {
      throw checkpointError(indexPath, `tensor ${shown(key)} is not in ${name}, where the index puts it`, undefined, {
        key,
        shard: name,
      })
    }
  }
  for (const [name, shard] of shards) {
    for (const key of shard.keys()) {
      const owner = weightMap.get(key)
      if (owner === name) continue
      const where = owner === undefined ? 'the index does not name it' : `the index puts it into ${owner}`
      throw checkpointError(shard.path, `holds tensor ${shown(key)}, but ${where}`, undefined, { key, shard: name })
    }
  }
}

/** A checkpoint in several files. Made by {@link openCheckpoint}. */
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
