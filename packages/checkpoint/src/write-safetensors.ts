/** @file Writes one safetensors file, tensor by tensor. */

import { basename, dirname } from 'node:path'
import { checkOptions } from '@moe/core'
import type { Append } from './atomic-file.ts'
import { checkpointError } from './checkpoint-error.ts'
import { diskTarget } from './disk-folder.ts'
import type { TargetFolder } from './folder.ts'
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

/**
 * A tensor to write. If `data` is a function, it is called once, when the tensor is written, so that only one tensor is in memory at a
 * time. The array must have the type of the dtype (see {@link StoredArray}), or be a `Uint8Array` of its raw little-endian bytes.
 */
export interface TensorEntry {
  /** Name, unique in the checkpoint. */
  readonly name: string
  /** The dtype that `data` already has; nothing is converted. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` for a scalar. */
  readonly shape: readonly number[]
  /** The elements, row-major, or a function that returns them. */
  readonly data: StoredArray | (() => StoredArray | Promise<StoredArray>)
}

/** Options of {@link writeSafetensors}. */
export interface WriteOptions {
  /** Metadata for the header, and for the index if there is one. Default `{ format: 'pt' }` in headers, which transformers requires. */
  readonly metadata?: Readonly<Record<string, string>> | undefined
}

/**
 * Writes a safetensors file. Tensors are sorted by decreasing element size, so that each is aligned; otherwise the order of `entries` is
 * kept. All names, dtypes and shapes are validated before the first byte is written. The file appears complete or not at all: it is
 * written under a temporary name, flushed to disk, and renamed.
 *
 * @returns the size of the file in bytes
 * @throws {MoeError} `E_CHECKPOINT` for invalid entries and if the file system fails (an existing file then stays unchanged); errors of a
 *   `data` function are passed on
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

/** As {@link writeSafetensors}, in a folder. @internal */
export async function writeInFolder(
  folder: TargetFolder,
  name: string,
  entries: Iterable<TensorEntry>,
  options: WriteOptions = {},
  beforeSwitch?: () => Promise<void>,
): Promise<number> {
  return writePlanned(folder, name, planEntries(folder.pathOf(name), entries), options, beforeSwitch)
}

/** A validated entry with its size. */
export interface PlannedTensor extends TensorEntry {
  readonly bytes: number
}

/** Validates all entries before anything is written. */
export function planEntries(path: string, entries: Iterable<TensorEntry>): PlannedTensor[] {
  if (typeof entries?.[Symbol.iterator] !== 'function')
    throw checkpointError(path, 'expected a list of tensors', 'pass entries, for example stateDict(module)')
  const names = new Set<string>()
  const planned: PlannedTensor[] = []
  for (const { name, dtype, shape, data } of entries) {
    const refuse = (problem: string, fix?: string) =>
      checkpointError(path, `tensor ${JSON.stringify(name)} ${problem}`, fix, { key: name })
    if (typeof name !== 'string' || name === '' || name === '__metadata__' || /\p{Surrogate}/u.test(name)) {
      throw refuse('has an invalid name', 'use well-formed text other than "" and "__metadata__"')
    }
    if (names.has(name)) throw refuse('occurs twice', 'use unique names')
    if (!isStoredDType(dtype)) throw refuse(`has the unknown dtype ${JSON.stringify(dtype)}`)
    if (!shape.every(size => Number.isSafeInteger(size) && size >= 0)) {
      throw refuse(`has the shape [${shape.join(', ')}]`, 'sizes must be non-negative integers')
    }
    const bytes = storedBytes(dtype, shape)
    if (Number.isNaN(bytes)) throw refuse(`of ${dtype} [${shape.join(', ')}] is not a whole number of bytes below 2^53`)
    if (typeof data !== 'function') checkedBytes(path, { name, dtype, shape, data, bytes }, data)
    names.add(name)
    planned.push({ name, dtype, shape: [...shape], data, bytes })
  }
  return planned
}

/** Writes entries that were validated by {@link planEntries}. Calls `beforeSwitch` when all are written, before the file appears. */
export async function writePlanned(
  folder: TargetFolder,
  name: string,
  entries: readonly PlannedTensor[],
  options: WriteOptions,
  beforeSwitch?: () => Promise<void>,
): Promise<number> {
  const path = folder.pathOf(name)
  const metadata = options.metadata ?? { format: 'pt' }
  for (const [key, value] of Object.entries(metadata)) {
    if (typeof value !== 'string') {
      throw checkpointError(
        path,
        `metadata.${key} is a ${typeof value}, expected a string`,
        'use JSON.stringify for other values',
      )
    }
    // Other libraries refuse the file.
    if (!key.isWellFormed() || !value.isWellFormed())
      throw checkpointError(path, `metadata ${JSON.stringify(key)} contains a lone surrogate`, 'use well-formed text')
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
    await beforeSwitch?.()
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
      `tensor ${JSON.stringify(name)} of dtype ${dtype} got ${given}`,
      `pass ${wanted}${wanted === 'Uint8Array' ? '' : ', or its bytes as Uint8Array'}`,
      { key: name, dtype },
    )
  }
  if (bytes.length !== entry.bytes) {
    throw checkpointError(
      path,
      `tensor ${JSON.stringify(name)} of dtype ${dtype} [${shape.join(', ')}] needs ${entry.bytes} bytes, got ${bytes.length}`,
      'make shape, dtype and data match',
      { key: name, dtype, shape },
    )
  }
  return bytes
}

const BUFFER_BYTES = 2 ** 20

/** Buffers small writes, so that thousands of small tensors do not cost a system call each. */
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
