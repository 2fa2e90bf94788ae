/** @file Reads one safetensors file lazily: the header when opened, tensors on request. */

import { checkOptions } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import { type FolderOptions, folderOptionNames, type OpenFile } from './folder.ts'
import { DEFAULT_MAX_HEADER_BYTES, type Header, headerLength, PREFIX_BYTES, parseHeader } from './header.ts'
import { openFile } from './locations.ts'
import { type StoredArray, type StoredDType, viewStored } from './stored-dtype.ts'

/** Describes a stored tensor without reading it. */
export interface TensorInfo {
  /** Dtype in the file. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` for a scalar. */
  readonly shape: readonly number[]
  /** Size of the data in bytes. */
  readonly bytes: number
  /** Path or URL of the file that contains the tensor. */
  readonly file: string
}

/** A tensor as stored, without conversion. */
export interface StoredTensor {
  /** Dtype in the file. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` for a scalar. */
  readonly shape: readonly number[]
  /** The elements, row-major; {@link StoredArray} lists the array type of each dtype. You may modify it. */
  readonly data: StoredArray
}

/** Tensors by name, from one or more files. */
export interface TensorSource {
  /** Path or URL of the file or folder that was opened. */
  readonly path: string
  /** Metadata of the file or, for a sharded checkpoint, of its index, as strings. */
  readonly metadata: Readonly<Record<string, string>>
  /** Names of all tensors, in the order of the file, shard by shard. */
  keys(): string[]
  /** Whether the source contains a tensor. */
  has(key: string): boolean
  /** Describes a tensor. @throws {MoeError} `E_CHECKPOINT` if it does not exist */
  info(key: string): TensorInfo
  /** Reads a tensor. @throws {MoeError} `E_CHECKPOINT` if it does not exist, or the file has changed or is closed */
  read(key: string): Promise<StoredTensor>
  /** Closes all files; later reads throw `E_CHECKPOINT`. May be called more than once. */
  close(): Promise<void>
  /** `close()`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Options of {@link readSafetensors}. */
export interface ReadOptions extends Omit<FolderOptions, 'root'> {
  /** Maximum header size in bytes. Default 32 MiB, enough for about 200,000 tensors. */
  readonly maxHeaderBytes?: number | undefined
}

/**
 * Opens a safetensors file and validates its header. Tensors are read later. The tensors must lie within the file and cover its data
 * exactly.
 *
 * @throws {MoeError} `E_CHECKPOINT`, naming the file and the problem
 *
 * @example
 * ```ts
 * await using file = await readSafetensors('model.safetensors')
 * for (const key of file.keys()) console.log(key, file.info(key).dtype, file.info(key).shape)
 * const { shape, data } = await file.read('model.norm.weight')
 * ```
 */
export async function readSafetensors(path: string | URL, options: ReadOptions = {}): Promise<SafetensorsFile> {
  const { root, ...names } = folderOptionNames
  checkOptions('readSafetensors', options, { ...names, maxHeaderBytes: true })
  return readFrom(await openFile('readSafetensors', path, options), options.maxHeaderBytes)
}

/** Reads the header of an open file. If that fails, the file is closed. @internal */
export async function readFrom(
  file: OpenFile,
  maxHeaderBytes: number = DEFAULT_MAX_HEADER_BYTES,
): Promise<SafetensorsFile> {
  try {
    const prefix = await readRange(file, 0, Math.min(PREFIX_BYTES, file.bytes))
    const length = headerLength(file.path, prefix, file.bytes, maxHeaderBytes)
    return new SafetensorsFile(file, parseHeader(file.path, await readRange(file, PREFIX_BYTES, length), file.bytes))
  } catch (error) {
    await file.close()
    throw error
  }
}

/** An open safetensors file, returned by {@link readSafetensors}. It keeps a file descriptor open until you close it. */
export class SafetensorsFile implements TensorSource {
  readonly path: string
  readonly metadata: Readonly<Record<string, string>>
  readonly #entries: Header['entries']
  #file: OpenFile | undefined

  /** @internal */
  constructor(file: OpenFile, header: Header) {
    this.path = file.path
    this.metadata = header.metadata
    this.#file = file
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
    if (!this.#file) throw checkpointError(this.path, 'the file is closed', 'read before close()', { key })
    const data = await readRange(this.#file, begin, bytes)
    return { dtype, shape, data: viewStored(dtype, data) }
  }

  async close(): Promise<void> {
    const file = this.#file
    this.#file = undefined
    await file?.close()
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

/** The error for a missing tensor; suggests names with the same last two components. */
export function missingTensor(path: string, key: string, keys: Iterable<string>) {
  const last = key.split('.').slice(-2).join('.')
  const near = [...keys].filter(other => other.endsWith(last)).slice(0, 3)
  const fix = near.length > 0 ? `similar names: ${near.map(shown).join(', ')}` : 'call keys() for all names'
  return checkpointError(path, `no tensor ${shown(key)}`, fix, { key })
}

/** Reads exactly `bytes` bytes from `position` into a new array. */
export async function readRange(file: OpenFile, position: number, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
  const out = allocate(file.path, bytes)
  let done = 0
  while (done < bytes) {
    const read = await file.read(out, done, bytes - done, position + done)
    if (read === 0) {
      throw checkpointError(file.path, `ends at byte ${position + done}; it was truncated after it was opened`)
    }
    done += read
  }
  return out
}

/**
 * Reads a complete file and closes it.
 * @throws MoeError E_CHECKPOINT if it is longer than `maxBytes`
 * @internal
 */
export async function readAll(file: OpenFile, maxBytes: number): Promise<Uint8Array<ArrayBuffer>> {
  try {
    if (file.bytes <= maxBytes) return await readRange(file, 0, file.bytes)
    throw checkpointError(file.path, `it has ${file.bytes} bytes, more than the limit of ${maxBytes}`)
  } finally {
    await file.close()
  }
}

function allocate(path: string, bytes: number): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(bytes)
  } catch (cause) {
    throw checkpointError(path, `cannot allocate ${bytes} bytes`, undefined, { bytes }, cause)
  }
}
