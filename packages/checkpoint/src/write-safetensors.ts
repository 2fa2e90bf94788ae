/** @file Writes one safetensors file, a tensor at a time. */

import { basename, dirname } from 'node:path'
import { checkOptions } from '@moe/core'
import type { Append } from './atomic-file.ts'
import { checkpointError } from './checkpoint-error.ts'
import { encodeHeader } from './header.ts'
import { pathOf } from './path-of.ts'
import {
  arrayName,
  bytesOf,
  isStoredDType,
  type StoredArray,
  type StoredDType,
  storedBits,
  storedBytes,
} from './stored-dtype.ts'
import { diskTarget, type TargetFolder } from './target-folder.ts'

/**
 * A tensor to be written. `data` may be a function, called when its turn comes and once only: then no more than one tensor
 * need be in memory. The array is that of the dtype (see {@link StoredArray}), or its raw little-endian bytes as a Uint8Array.
 */
export interface TensorEntry {
  /** Unique in the checkpoint. */
  readonly name: string
  /** What `data` is encoded as already; nothing is converted. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` is a scalar. */
  readonly shape: readonly number[]
  /** The elements, row-major, or what gives them. */
  readonly data: StoredArray | (() => StoredArray | Promise<StoredArray>)
}

/** What stands in the header besides the tensors. */
export interface WriteOptions {
  /** Free text for the header. transformers wants `{ format: 'pt' }`, which is the default. */
  readonly metadata?: Readonly<Record<string, string>>
}

/**
 * Writes a safetensors file that Python's safetensors opens. Larger elements come first, so that every tensor is aligned to
 * its element; otherwise the order is that of `entries`. All names, dtypes and shapes are checked before the first byte is
 * written, and the file appears complete or not at all: it is written beside `path`, flushed, and renamed.
 *
 * @returns bytes of the file
 * @throws {MoeError} `E_CHECKPOINT` for entries that cannot be written and for failures of the file system (after which
 *   whatever stood at `path` is unchanged); errors of a `data` function pass through
 *
 * @example
 * ```ts
 * await writeSafetensors('norm.safetensors', [
 *   { name: 'model.norm.weight', dtype: 'f32', shape: [4], data: new Float32Array(4).fill(1) },
 * ])
 * ```
 */
export async function writeSafetensors(
  path: string | URL,
  entries: Iterable<TensorEntry>,
  options: WriteOptions = {},
): Promise<number> {
  const file = pathOf('writeSafetensors', path)
  checkOptions('writeSafetensors', options, { metadata: true })
  return writePlanned(diskTarget(dirname(file)), basename(file), planEntries(file, entries), options)
}

/** The same in a folder. @internal */
export async function writeInFolder(
  folder: TargetFolder,
  name: string,
  entries: Iterable<TensorEntry>,
  options: WriteOptions = {},
): Promise<number> {
  return writePlanned(folder, name, planEntries(folder.pathOf(name), entries), options)
}

/** An entry that was checked, with its size. */
export interface PlannedTensor extends TensorEntry {
  readonly bytes: number
}

/** Checks every entry, before anything is written. */
export function planEntries(path: string, entries: Iterable<TensorEntry>): PlannedTensor[] {
  if (typeof entries?.[Symbol.iterator] !== 'function')
    throw checkpointError(
      path,
      'there is no list of tensors to write',
      'pass entries: those of a module are stateDict(module)',
    )
  const names = new Set<string>()
  const planned: PlannedTensor[] = []
  for (const { name, dtype, shape, data } of entries) {
    const refuse = (problem: string, fix?: string) =>
      checkpointError(path, `tensor ${JSON.stringify(name)} ${problem}`, fix, { key: name })
    if (typeof name !== 'string' || name === '' || name === '__metadata__' || /\p{Surrogate}/u.test(name)) {
      throw refuse('has a name that safetensors cannot hold', 'use well-formed text other than "" and "__metadata__"')
    }
    if (names.has(name)) throw refuse('occurs twice', 'give every tensor its own name')
    if (!isStoredDType(dtype)) throw refuse(`has the unknown dtype ${JSON.stringify(dtype)}`)
    if (!shape.every(size => Number.isSafeInteger(size) && size >= 0)) {
      throw refuse(`has the shape [${shape.join(', ')}]`, 'sizes must be whole numbers from 0')
    }
    const bytes = storedBytes(dtype, shape)
    if (Number.isNaN(bytes)) throw refuse(`of ${dtype} [${shape.join(', ')}] is not a whole number of bytes below 2^53`)
    if (typeof data !== 'function') checkedBytes(path, { name, dtype, shape, data, bytes }, data)
    names.add(name)
    planned.push({ name, dtype, shape: [...shape], data, bytes })
  }
  return planned
}

/** Writes entries that {@link planEntries} has checked. */
export async function writePlanned(
  folder: TargetFolder,
  name: string,
  entries: readonly PlannedTensor[],
  options: WriteOptions,
): Promise<number> {
  const path = folder.pathOf(name)
  const metadata = options.metadata ?? { format: 'pt' }
  for (const [key, value] of Object.entries(metadata)) {
    if (typeof value === 'string') continue
    throw checkpointError(
      path,
      `metadata.${key} is a ${typeof value}`,
      'metadata holds strings only; use JSON.stringify',
    )
  }
  const ordered = [...entries].sort((a, b) => storedBits(b.dtype) - storedBits(a.dtype))
  const header = encodeHeader(ordered, metadata)
  await folder.write(name, async append => {
    const buffered = bufferSmall(append)
    await buffered.append(header)
    for (const entry of ordered) {
      const data = typeof entry.data === 'function' ? await entry.data() : entry.data
      await buffered.append(checkedBytes(path, entry, data))
    }
    await buffered.flush()
  })
  return header.length + entries.reduce((sum, entry) => sum + entry.bytes, 0)
}

function checkedBytes(path: string, entry: PlannedTensor, data: unknown): Uint8Array {
  const { name, dtype, shape } = entry
  const bytes = bytesOf(dtype, data)
  if (!bytes) {
    const given = (data as object | undefined)?.constructor?.name ?? typeof data
    const wanted = arrayName(dtype)
    throw checkpointError(
      path,
      `tensor ${JSON.stringify(name)} of ${dtype} was given ${given}`,
      `pass ${wanted}${wanted === 'Uint8Array' ? '' : ', or its bytes as Uint8Array'}`,
      { key: name, dtype },
    )
  }
  if (bytes.length !== entry.bytes) {
    throw checkpointError(
      path,
      `tensor ${JSON.stringify(name)} of ${dtype} [${shape.join(', ')}] needs ${entry.bytes} bytes, its data has ${bytes.length}`,
      'shape, dtype and data must agree',
      { key: name, dtype, shape },
    )
  }
  return bytes
}

const BUFFER_BYTES = 2 ** 20

/** Collects small pieces, so that thousands of small tensors do not cost a system call each. */
function bufferSmall(append: Append) {
  const buffer = new Uint8Array(BUFFER_BYTES)
  let used = 0
  const flush = async () => {
    const filled = buffer.subarray(0, used)
    used = 0
    await append(filled)
  }
  return {
    flush,
    async append(bytes: Uint8Array) {
      if (bytes.length > BUFFER_BYTES - used) await flush()
      if (bytes.length >= BUFFER_BYTES) return append(bytes)
      buffer.set(bytes, used)
      used += bytes.length
    },
  }
}
