/** @file A checkpoint as Hugging Face lays it out: one safetensors file, or shards and their index, under one interface. */

import { realpath, stat } from 'node:fs/promises'
import { basename, dirname, isAbsolute, join, relative, resolve, sep } from 'node:path'
import { checkOptions } from '@moe/core'
import { checkpointError, fileError, shown } from './checkpoint-error.ts'
import { pathOf } from './path-of.ts'
import {
  missingTensor,
  openRegularFile,
  type ReadOptions,
  readRange,
  readSafetensors,
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

/** Limits of reading, and where files may lie. */
export interface OpenOptions extends ReadOptions {
  /**
   * Folder that the files must lie in after symbolic links are followed. Default: the checkpoint's own folder. A snapshot in
   * the Hugging Face cache consists of links, so pass the `models--...` folder above it.
   */
  readonly root?: string
}

/**
 * Opens a safetensors file, a folder with `model.safetensors`, or a folder (or index file) with
 * `model.safetensors.index.json` and its shards. A folder with both is read as the single file, as transformers does. Reads
 * all headers, no tensors; keeps one file descriptor for each shard until closed.
 *
 * @throws {MoeError} `E_CHECKPOINT`, naming the file and the fault: besides those of {@link readSafetensors}, an index that
 *   names files outside the folder, a shard that is a link out of it, a tensor that is missing, or in two shards, or in none
 *   of the index
 */
export async function openCheckpoint(path: string | URL, options: OpenOptions = {}): Promise<TensorSource> {
  checkOptions('openCheckpoint', options, { root: true, maxHeaderBytes: true })
  return openAt(pathOf('openCheckpoint', path), options)
}

async function openAt(path: string, options: OpenOptions): Promise<TensorSource> {
  const { root, ...reading } = options
  const stats = await stat(path).catch(cause => {
    throw fileError(path, 'opening', cause)
  })
  if (!stats.isDirectory()) {
    return path.endsWith('.json') ? openSharded(path, options) : readSafetensors(path, reading)
  }
  const single = join(path, SINGLE_FILE)
  if (await exists(single)) {
    await refuseOutside(single, root ?? path)
    return readSafetensors(single, reading)
  }
  const index = join(path, INDEX_FILE)
  if (await exists(index)) return openSharded(index, options)
  throw checkpointError(
    path,
    `the folder has neither ${SINGLE_FILE} nor ${INDEX_FILE}`,
    'pass the folder of a checkpoint',
  )
}

interface CheckpointIndex {
  /** File name of each tensor. */
  readonly weightMap: ReadonlyMap<string, string>
  readonly metadata: Readonly<Record<string, string>>
}

async function openSharded(indexPath: string, options: OpenOptions): Promise<ShardedCheckpoint> {
  const folder = dirname(resolve(indexPath))
  const { root = folder, ...reading } = options
  await refuseOutside(indexPath, root)
  const index = await readIndex(indexPath)
  const shards = new Map<string, SafetensorsFile>()
  try {
    for (const name of new Set(index.weightMap.values())) {
      const path = join(folder, name)
      await refuseOutside(path, root)
      shards.set(name, await readSafetensors(path, reading))
    }
    checkShards(indexPath, index, shards)
    return new ShardedCheckpoint(dirname(indexPath), index, shards)
  } catch (error) {
    for (const shard of shards.values()) await shard.close()
    throw error
  }
}

/** The index of a sharded checkpoint, with every shard name checked to be a plain file name. */
export async function readIndex(path: string): Promise<CheckpointIndex> {
  const { handle, fileBytes } = await openRegularFile(path)
  let document: unknown
  try {
    if (fileBytes > MAX_INDEX_BYTES) {
      throw checkpointError(path, `the index has ${fileBytes} bytes, more than the ${MAX_INDEX_BYTES} allowed`)
    }
    document = parseStrictJson(withoutMark(await readRange(handle, path, 0, fileBytes)), 8)
  } catch (cause) {
    if (!(cause instanceof SyntaxError)) throw cause
    throw checkpointError(path, `the index cannot be read: ${cause.message}`, undefined, {}, cause)
  } finally {
    await handle.close()
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
  return name !== '' && name !== '.' && name !== '..' && !/[/\\\0]/.test(name) && basename(name) === name
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

/** Links are followed before the comparison, so neither `..` nor a link leads out. */
async function refuseOutside(path: string, root: string): Promise<void> {
  let target: string
  let base: string
  try {
    target = await realpath(path)
    base = await realpath(root)
  } catch (cause) {
    throw fileError(path, 'opening', cause)
  }
  const way = relative(base, target)
  if (way === '..' || way.startsWith(`..${sep}`) || isAbsolute(way)) {
    throw checkpointError(
      path,
      `is a link to ${target}, outside ${base}`,
      'copy the file, or pass { root } with a folder that holds both if you trust it',
      { target, root: base },
    )
  }
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    (cause: NodeJS.ErrnoException) => {
      if (cause.code === 'ENOENT') return false
      throw fileError(path, 'opening', cause)
    },
  )
}
