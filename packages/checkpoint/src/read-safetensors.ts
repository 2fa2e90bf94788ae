/** @file One safetensors file, read lazily: the header when it is opened, each tensor when it is asked for. */

import { constants, type Stats } from 'node:fs'
import { type FileHandle, open, stat } from 'node:fs/promises'
import { checkOptions } from '@moe/core'
import { checkpointError, fileError, shown } from './checkpoint-error.ts'
import { DEFAULT_MAX_HEADER_BYTES, type Header, headerLength, PREFIX_BYTES, parseHeader } from './header.ts'
import { pathOf } from './path-of.ts'
import { type StoredArray, type StoredDType, viewStored } from './stored-dtype.ts'

/** What is known of a tensor without reading it. */
export interface TensorInfo {
  /** As it is stored. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` is a scalar. */
  readonly shape: readonly number[]
  /** Size of its data. */
  readonly bytes: number
  /** Path of the file that holds it. */
  readonly file: string
}

/** A tensor as it is stored: nothing is converted. */
export interface StoredTensor {
  /** As it is stored. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` is a scalar. */
  readonly shape: readonly number[]
  /** Row-major; see {@link StoredArray} for how each dtype travels. The caller owns it. */
  readonly data: StoredArray
}

/** Tensors by name, from one file or several. */
export interface TensorSource {
  /** Path of the file or folder that was opened. */
  readonly path: string
  /** Free text of the file; for a sharded checkpoint, the `metadata` of its index as strings. */
  readonly metadata: Readonly<Record<string, string>>
  /** Names, in the order of the file, shard after shard. */
  keys(): string[]
  /** Whether there is a tensor of this name. */
  has(key: string): boolean
  /** @throws {MoeError} `E_CHECKPOINT` if there is no such tensor */
  info(key: string): TensorInfo
  /** @throws {MoeError} `E_CHECKPOINT` if there is no such tensor, the file changed since it was opened, or is closed */
  read(key: string): Promise<StoredTensor>
  /** Gives the file descriptors back; reading throws `E_CHECKPOINT` afterwards. Harmless when repeated. */
  close(): Promise<void>
  /** `close()`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Limits of reading. */
export interface ReadOptions {
  /** Largest header to accept, in bytes. Default 32 MiB, room for about 200,000 tensors. */
  readonly maxHeaderBytes?: number
}

/**
 * Opens a safetensors file and checks all of its header; no tensor is read yet. A file whose header points outside it, or
 * does not account for each of its bytes, is refused.
 *
 * @throws {MoeError} `E_CHECKPOINT`, naming the file and the fault
 *
 * @example
 * ```ts
 * await using file = await readSafetensors('model.safetensors')
 * for (const key of file.keys()) console.log(key, file.info(key).dtype, file.info(key).shape)
 * const { shape, data } = await file.read('model.norm.weight')
 * ```
 */
export async function readSafetensors(path: string | URL, options: ReadOptions = {}): Promise<SafetensorsFile> {
  checkOptions('readSafetensors', options, { maxHeaderBytes: true })
  return readFrom(pathOf('readSafetensors', path), options)
}

async function readFrom(path: string, options: ReadOptions): Promise<SafetensorsFile> {
  const { handle, fileBytes } = await openRegularFile(path)
  try {
    const prefix = await readRange(handle, path, 0, Math.min(PREFIX_BYTES, fileBytes))
    const length = headerLength(path, prefix, fileBytes, options.maxHeaderBytes ?? DEFAULT_MAX_HEADER_BYTES)
    const header = parseHeader(path, await readRange(handle, path, PREFIX_BYTES, length), fileBytes)
    return new SafetensorsFile(path, handle, header)
  } catch (error) {
    await handle.close()
    throw error
  }
}

/** What is used of a `FileHandle` of Node, so that declarations do without Node's. */
export interface OpenFile {
  read(buffer: Uint8Array, offset: number, length: number, position: number): Promise<{ bytesRead: number }>
  close(): Promise<void>
}

/** An open safetensors file. Made by {@link readSafetensors}; holds one file descriptor until it is closed. */
export class SafetensorsFile implements TensorSource {
  readonly path: string
  readonly metadata: Readonly<Record<string, string>>
  readonly #entries: Header['entries']
  #handle: OpenFile | undefined

  /** @internal */
  constructor(path: string, handle: OpenFile, header: Header) {
    this.path = path
    this.metadata = header.metadata
    this.#handle = handle
    this.#entries = header.entries
  }

  keys(): string[] {
    return [...this.#entries.keys()]
  }

  has(key: string): boolean {
    return this.#entries.has(key)
  }

  info(key: string): TensorInfo {
    const { dtype, shape, bytes } = this.#entry(key)
    return { dtype, shape, bytes, file: this.path }
  }

  async read(key: string): Promise<StoredTensor> {
    const { dtype, shape, begin, bytes } = this.#entry(key)
    if (!this.#handle) throw checkpointError(this.path, 'the file is closed', 'read before close()', { key })
    const data = await readRange(this.#handle, this.path, begin, bytes)
    return { dtype, shape, data: viewStored(dtype, data) }
  }

  async close(): Promise<void> {
    const handle = this.#handle
    this.#handle = undefined
    await handle?.close()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #entry(key: string) {
    const entry = this.#entries.get(key)
    if (!entry) throw missingTensor(this.path, key, this.#entries.keys())
    return entry
  }
}

/** The error for a name that a source does not hold; suggests the names that share its last part. */
export function missingTensor(path: string, key: string, keys: Iterable<string>) {
  const last = key.split('.').slice(-2).join('.')
  const near = [...keys].filter(other => other.endsWith(last)).slice(0, 3)
  const fix = near.length > 0 ? `it has ${near.map(shown).join(', ')}` : 'keys() lists what it has'
  return checkpointError(path, `there is no tensor ${shown(key)}`, fix, { key })
}

/** Opens for reading without ever waiting on a pipe or device. */
export async function openRegularFile(path: string): Promise<{ handle: FileHandle; fileBytes: number }> {
  let handle: FileHandle | undefined
  try {
    refuseSpecial(path, await stat(path))
    // Not blocking, and checked again on the open file: the path may have changed in between.
    handle = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0))
    const stats = await handle.stat()
    refuseSpecial(path, stats)
    return { handle, fileBytes: stats.size }
  } catch (cause) {
    await handle?.close()
    throw fileError(path, 'opening', cause)
  }
}

function refuseSpecial(path: string, stats: Stats): void {
  if (stats.isFile()) return
  throw checkpointError(path, stats.isDirectory() ? 'is a folder, expected a file' : 'is not a regular file')
}

/** Node refuses single reads of 2 GiB and more. */
const MAX_READ_BYTES = 2 ** 30

/** Reads exactly `bytes` bytes from `position` into memory of their own. */
export async function readRange(
  handle: Pick<OpenFile, 'read'>,
  path: string,
  position: number,
  bytes: number,
): Promise<Uint8Array<ArrayBuffer>> {
  const out = allocate(path, bytes)
  let done = 0
  while (done < bytes) {
    const length = Math.min(bytes - done, MAX_READ_BYTES)
    let bytesRead: number
    try {
      bytesRead = (await handle.read(out, done, length, position + done)).bytesRead
    } catch (cause) {
      throw fileError(path, 'reading', cause)
    }
    if (bytesRead === 0) {
      throw checkpointError(path, `it ends at byte ${position + done}; it was longer when it was opened`)
    }
    done += bytesRead
  }
  return out
}

function allocate(path: string, bytes: number): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(bytes)
  } catch (cause) {
    throw checkpointError(path, `there is no memory for ${bytes} bytes`, undefined, { bytes }, cause)
  }
}
