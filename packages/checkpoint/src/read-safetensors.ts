/** @file One safetensors file, read lazily: the header when it is opened, each tensor when it is asked for. */

import { checkOptions } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import { type FolderOptions, folderOptionNames, type OpenFile } from './folder.ts'
import { DEFAULT_MAX_HEADER_BYTES, type Header, headerLength, PREFIX_BYTES, parseHeader } from './header.ts'
import { openFile } from './places.ts'
import { type StoredArray, type StoredDType, viewStored } from './stored-dtype.ts'

/** What is known of a tensor without reading it. */
export interface TensorInfo {
  /** As it is stored. */
  readonly dtype: StoredDType
  /** Sizes of the axes; `[]` is a scalar. */
  readonly shape: readonly number[]
  /** Size of its data. */
  readonly bytes: number
  /** Path or address of the file that holds it. */
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
  /** Path or address of the file or folder that was opened. */
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

/** How a file is read, and limits. */
export interface ReadOptions extends Omit<FolderOptions, 'root'> {
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
  const { root, ...names } = folderOptionNames
  checkOptions('readSafetensors', options, { ...names, maxHeaderBytes: true })
  return readFrom(await openFile('readSafetensors', path, options), options.maxHeaderBytes)
}

/** Reads the header of an open file, which is closed if that cannot be read. @internal */
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

/** An open safetensors file. Made by {@link readSafetensors}; holds one file descriptor until it is closed. */
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

/** The error for a name that a source does not hold; suggests the names that share its last part. */
export function missingTensor(path: string, key: string, keys: Iterable<string>) {
  const last = key.split('.').slice(-2).join('.')
  const near = [...keys].filter(other => other.endsWith(last)).slice(0, 3)
  const fix = near.length > 0 ? `it has ${near.map(shown).join(', ')}` : 'keys() lists what it has'
  return checkpointError(path, `there is no tensor ${shown(key)}`, fix, { key })
}

/** Reads exactly `bytes` bytes from `position` into memory of their own. */
export async function readRange(file: OpenFile, position: number, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
  const out = allocate(file.path, bytes)
  let done = 0
  while (done < bytes) {
    const read = await file.read(out, done, bytes - done, position + done)
    if (read === 0) {
      throw checkpointError(file.path, `it ends at byte ${position + done}; it was longer when it was opened`)
    }
    done += read
  }
  return out
}

/**
 * All of a file, which is then closed.
 * @throws MoeError E_CHECKPOINT where it is longer than `maxBytes`
 * @internal
 */
export async function readAll(file: OpenFile, maxBytes: number): Promise<Uint8Array<ArrayBuffer>> {
  try {
    if (file.bytes <= maxBytes) return await readRange(file, 0, file.bytes)
    throw checkpointError(file.path, `it has ${file.bytes} bytes, more than the ${maxBytes} allowed`)
  } finally {
    await file.close()
  }
}

function allocate(path: string, bytes: number): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(bytes)
  } catch (cause) {
    throw checkpointError(path, `there is no memory for ${bytes} bytes`, undefined, { bytes }, cause)
  }
}
