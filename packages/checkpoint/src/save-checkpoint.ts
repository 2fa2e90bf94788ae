/** @file Saves tensors in the Hugging Face layout, in one file or in shards, so that a crash at any moment leaves a checkpoint. */

import { randomBytes } from 'node:crypto'
import { checkOptions } from '@moe/core'
import { checkpointError, fileError } from './checkpoint-error.ts'
import { INDEX_FILE, readIndex, SINGLE_FILE } from './open-checkpoint.ts'
import { openFolder } from './places.ts'
import { type FolderPlace, type TargetFolder, targetFolder, writeText } from './target-folder.ts'
import {
  type PlannedTensor,
  planEntries,
  type TensorEntry,
  type WriteOptions,
  writePlanned,
} from './write-safetensors.ts'

/** Metadata, and how large a shard may be. */
export interface SaveOptions extends WriteOptions {
  /** Largest data of one shard, in bytes; one tensor that is larger gets a shard of its own. Default 5 GB, as transformers. */
  readonly maxShardBytes?: number
}

/** What was written. */
export interface SavedCheckpoint {
  /** Names of the files in the folder that make up the checkpoint. */
  readonly files: readonly string[]
  /** Bytes of all tensors, without headers. */
  readonly dataBytes: number
}

/**
 * Saves a checkpoint into a folder: `model.safetensors`, or shards with `model.safetensors.index.json` when the tensors exceed
 * `maxShardBytes`. Shards are filled in the order of `entries`.
 *
 * A checkpoint that is already there stays readable until the new one is complete, and is then removed: new shards never
 * take the names of old ones, and the switch is a single rename (or, from one file to shards, a single removal). Other files in
 * the folder are left alone. Windows does not replace a file that is open: close the source before saving into its folder.
 *
 * @throws {MoeError} `E_CHECKPOINT` as {@link writeSafetensors}; the previous checkpoint is then whole and nothing new is left
 */
export async function saveCheckpoint(
  place: FolderPlace,
  entries: Iterable<TensorEntry>,
  options: SaveOptions = {},
): Promise<SavedCheckpoint> {
  checkOptions('saveCheckpoint', options, { metadata: true, maxShardBytes: true })
  const folder = targetFolder('saveCheckpoint', place)
  const maxShardBytes = options.maxShardBytes ?? 5e9
  if (!(maxShardBytes > 0)) {
    throw checkpointError(folder.path, `maxShardBytes is ${maxShardBytes}`, 'it must be above 0')
  }
  const planned = planEntries(folder.path, entries)
  const dataBytes = planned.reduce((sum, entry) => sum + entry.bytes, 0)
  const present = await folder.names()
  const previous = present.has(INDEX_FILE) ? await previousShards(place) : []
  const written =
    dataBytes <= maxShardBytes
      ? await saveSingle(folder, planned, options)
      : await saveShards(folder, fillShards(planned, maxShardBytes), dataBytes, present, options)
  // From here on the new checkpoint is the one that opens.
  const files = new Set(written)
  const stale = [...previous, INDEX_FILE].filter(name => present.has(name) && !files.has(name))
  // Where somebody has one open, Windows does not remove it: a stray file does no harm.
  for (const name of stale) await folder.remove(name).catch(() => {})
  if (stale.length > 0) await folder.flush()
  return { files: written, dataBytes }
}

/** Shards of the checkpoint that is being replaced. An index that cannot be read names none: better a stray file than a lost one. */
async function previousShards(place: FolderPlace): Promise<string[]> {
  try {
    const index = await openFolder('saveCheckpoint', place).open(INDEX_FILE)
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
): Promise<string[]> {
  await writePlanned(folder, SINGLE_FILE, planned, options)
  return [SINGLE_FILE]
}

async function saveShards(
  folder: TargetFolder,
  shards: readonly PlannedTensor[][],
  dataBytes: number,
  present: ReadonlySet<string>,
  options: WriteOptions,
): Promise<string[]> {
  const names = shardNames(shards.length, present)
  const written: string[] = []
  try {
    for (const [i, shard] of shards.entries()) {
      await writePlanned(folder, names[i], shard, options)
      written.push(names[i])
    }
    const weightMap = Object.fromEntries(shards.flatMap((shard, i) => shard.map(({ name }) => [name, names[i]])))
    const index = { metadata: { total_size: dataBytes }, weight_map: weightMap }
    await writeText(folder, INDEX_FILE, `${JSON.stringify(index, null, 2)}\n`)
    written.push(INDEX_FILE)
    // A folder with both is read as the single file, so its removal is what switches over.
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
      'it is still the checkpoint of this folder: close what has it open, then save again',
    )
  })
}

/** `model-00001-of-00003.safetensors`, as transformers names them; with a random part where such a file is already there. */
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
