/** @file Saves checkpoints in the Hugging Face layout, as one file or in shards. A crash at any time leaves a complete checkpoint. */

import { randomBytes } from 'node:crypto'
import { checkOptions } from '@moe/core'
import { checkpointError, fileError } from './checkpoint-error.ts'
import { type TargetFolder, writeText } from './folder.ts'
import { type FolderLocation, openFolder, targetFolder } from './locations.ts'
import { INDEX_FILE, readIndex, SINGLE_FILE } from './open-checkpoint.ts'
import { writeWithText } from './with-text.ts'
import {
  type PlannedTensor,
  planEntries,
  type TensorEntry,
  type WriteOptions,
  writePlanned,
} from './write-safetensors.ts'

/** Options of {@link saveCheckpoint}. */
export interface SaveOptions extends WriteOptions {
  /** Maximum data size of a shard in bytes. A larger tensor gets its own shard. Default 5 GB, as in transformers. */
  readonly maxShardBytes?: number | undefined
}

/** The result of {@link saveCheckpoint}. */
export interface SavedCheckpoint {
  /** Names of the files that make up the checkpoint. */
  readonly files: readonly string[]
  /** Size of all tensors in bytes, without headers. */
  readonly dataBytes: number
}

/**
 * Saves a checkpoint into a folder, which is created if necessary: as `model.safetensors`, or as shards with
 * `model.safetensors.index.json` if the tensors exceed `maxShardBytes`. Shards are filled in the order of `entries`.
 *
 * An existing checkpoint stays readable until the new one is complete, and is then removed. New shards never reuse the names of old
 * ones, and the switch is a single rename (or, from one file to shards, a single removal). Other files in the folder are not touched.
 * Windows cannot replace an open file, so close the source before saving into its folder. Calls for the same folder wait for each other;
 * another process must not save into it at the same time.
 *
 * @throws {MoeError} `E_CHECKPOINT` as {@link writeSafetensors}. The previous checkpoint then stays intact, and no new files remain
 */
export async function saveCheckpoint(
  location: FolderLocation,
  entries: Iterable<TensorEntry>,
  options: SaveOptions = {},
): Promise<SavedCheckpoint> {
  return saveBefore(location, entries, options, async () => {})
}

/** As {@link saveCheckpoint}, followed by a text file that describes the tensors: see {@link writeWithText}. @internal */
export async function saveCheckpointWithText(
  location: FolderLocation,
  entries: Iterable<TensorEntry>,
  options: SaveOptions,
  text: { readonly name: string; readonly text: string },
): Promise<SavedCheckpoint> {
  return writeWithText('saveCheckpoint', location, text, beforeSwitch =>
    saveBefore(location, entries, options, beforeSwitch),
  )
}

async function saveBefore(
  location: FolderLocation,
  entries: Iterable<TensorEntry>,
  options: SaveOptions,
  beforeSwitch: () => Promise<void>,
): Promise<SavedCheckpoint> {
  checkOptions('saveCheckpoint', options, { metadata: true, maxShardBytes: true })
  const folder = targetFolder('saveCheckpoint', location)
  const maxShardBytes = options.maxShardBytes ?? 5e9
  if (!(maxShardBytes > 0)) {
    throw checkpointError(folder.path, `maxShardBytes is ${maxShardBytes}`, 'pass a positive number')
  }
  const planned = planEntries(folder.path, entries)
  return inTurn(folder.pathOf(SINGLE_FILE), () => save(folder, location, planned, maxShardBytes, options, beforeSwitch))
}

/** The last save into each folder. Two at the same time would choose the same names for their shards, and mix them. */
const lastSaves = new Map<string, Promise<unknown>>()

function inTurn<T>(folder: string, work: () => Promise<T>): Promise<T> {
  const result = (lastSaves.get(folder) ?? Promise.resolve()).then(work)
  const settled = result.then(
    () => {},
    () => {},
  )
  lastSaves.set(folder, settled)
  void settled.then(() => lastSaves.get(folder) === settled && lastSaves.delete(folder))
  return result
}

async function save(
  folder: TargetFolder,
  location: FolderLocation,
  planned: readonly PlannedTensor[],
  maxShardBytes: number,
  options: WriteOptions,
  beforeSwitch: () => Promise<void>,
): Promise<SavedCheckpoint> {
  const dataBytes = planned.reduce((sum, entry) => sum + entry.bytes, 0)
  const present = await folder.names()
  const previous = present.has(INDEX_FILE) ? await previousShards(location) : []
  const written =
    dataBytes <= maxShardBytes
      ? await saveSingle(folder, planned, options, beforeSwitch)
      : await saveShards(folder, fillShards(planned, maxShardBytes), dataBytes, present, options, beforeSwitch)
  // From here on, the folder opens as the new checkpoint.
  const files = new Set(written)
  const stale = [...previous, INDEX_FILE].filter(name => present.has(name) && !files.has(name))
  // Windows does not remove files that are open. Leaving one behind is harmless.
  for (const name of stale) await folder.remove(name).catch(() => {})
  await folder.flush()
  return { files: written, dataBytes }
}

/** Returns the shards of the checkpoint that is replaced. If its index is invalid, nothing is removed: better a stray file than a lost one. */
async function previousShards(location: FolderLocation): Promise<string[]> {
  try {
    const index = await openFolder('saveCheckpoint', location).open(INDEX_FILE)
    const { weightMap } = await readIndex(index!)
    return [...new Set(weightMap.values())].filter(name => name.endsWith('.safetensors'))
  } catch {
    return []
  }
}

async function saveSingle(
  folder: TargetFolder,
  planned: readonly PlannedTensor[],
  options: WriteOptions,
  beforeSwitch: () => Promise<void>,
): Promise<string[]> {
  await writePlanned(folder, SINGLE_FILE, planned, options, beforeSwitch)
  return [SINGLE_FILE]
}

async function saveShards(
  folder: TargetFolder,
  shards: readonly PlannedTensor[][],
  dataBytes: number,
  present: ReadonlySet<string>,
  options: WriteOptions,
  beforeSwitch: () => Promise<void>,
): Promise<string[]> {
  const names = shardNames(shards.length, present)
  const written: string[] = []
  try {
    for (const [i, shard] of shards.entries()) {
      await writePlanned(folder, names[i], shard, options)
      written.push(names[i])
    }
    const weightMap = Object.fromEntries(shards.flatMap((shard, i) => shard.map(({ name }) => [name, names[i]])))
    const index = { metadata: { ...options.metadata, total_size: dataBytes }, weight_map: weightMap }
    await beforeSwitch()
    await writeText(folder, INDEX_FILE, `${JSON.stringify(index, null, 2)}\n`)
    written.push(INDEX_FILE)
    // If both exist, the single file is used, so removing it activates the new checkpoint.
    await removeSingle(folder)
  } catch (error) {
    for (const name of written) await folder.remove(name).catch(() => {})
    throw error
  }
  return written
}

async function removeSingle(folder: TargetFolder): Promise<void> {
  await folder.remove(SINGLE_FILE).catch(({ cause }) => {
    throw fileError(
      folder.pathOf(SINGLE_FILE),
      'removing',
      cause,
      'it is still the checkpoint of this folder; close programs that have it open, then save again',
    )
  })
}

/** `model-00001-of-00003.safetensors`, as in transformers, with a random part if a file of that name exists. */
function shardNames(count: number, present: ReadonlySet<string>): string[] {
  const of = String(count).padStart(5, '0')
  const names = (part: string) =>
    Array.from({ length: count }, (_, i) => `model-${String(i + 1).padStart(5, '0')}-of-${of}${part}.safetensors`)
  const plain = names('')
  return plain.some(name => present.has(name)) ? names(`-${randomBytes(4).toString('hex')}`) : plain
}

function fillShards(planned: readonly PlannedTensor[], maxShardBytes: number): PlannedTensor[][] {
  const shards: PlannedTensor[][] = []
  let room = -1
  for (const entry of planned) {
    if (entry.bytes > room) {
      shards.push([])
      room = maxShardBytes
    }
    shards[shards.length - 1].push(entry)
    room -= entry.bytes
  }
  return shards
}
