/** @file Reads GGUF files (versions 2 and 3, little-endian) with validation: the header when opened, tensors on request. */

import { checkOptions } from '@moe/core'
import { checkpointError, shown } from '../checkpoint-error.ts'
import { type FolderOptions, folderOptionNames, type OpenFile } from '../folder.ts'
import { openFile } from '../locations.ts'
import { missingTensor, readRange } from '../read-safetensors.ts'
import { decodeGguf } from './blocks.ts'
import { ByteReader, NeedsMoreBytes } from './byte-reader.ts'
import { padding } from './byte-writer.ts'
import { type GgufTensorType, tensorBytes, tensorTypeOfId } from './tensor-type.ts'
import type { GgufValue } from './value.ts'
import { alignmentOf, MAGIC, MAX_DIMENSIONS, MAX_NAME_BYTES, VERSION } from './write-gguf.ts'

/** Describes a tensor of a GGUF file without reading it. */
export interface GgufTensorInfo {
  /** Encoding of the elements. */
  readonly type: GgufTensorType
  /** Row-major: the reverse of the order in the file. */
  readonly shape: readonly number[]
  /** Size of the data in the file. */
  readonly bytes: number
  /** Position of the first byte in the file. */
  readonly begin: number
}

interface GgufHeader {
  readonly version: number
  readonly metadata: ReadonlyMap<string, GgufValue>
  readonly tensors: ReadonlyMap<string, GgufTensorInfo>
}

/** Options of {@link readGguf}. */
export interface ReadGgufOptions extends Omit<FolderOptions, 'root'> {
  /** Maximum header size in bytes. Default 64 MiB: the header contains the vocabulary, of up to about 20 MB. */
  readonly maxHeaderBytes?: number | undefined
}

/**
 * Opens a GGUF file and validates its header. Tensors are read later.
 *
 * @throws {MoeError} `E_CHECKPOINT`, naming the file and the problem: another format or version, big-endian numbers, counts and lengths
 *   that exceed the file, unknown value and tensor types, duplicate keys or tensors, and tensors that are misaligned, overlap, or
 *   extend beyond the end of the file
 *
 * @example
 * ```ts
 * await using file = await readGguf('tiny.gguf')
 * console.log(file.metadata.get('general.architecture')?.value) // llama
 * for (const [name, { type, shape }] of file.tensors) console.log(name, type, shape)
 * ```
 */
export async function readGguf(path: string | URL, options: ReadGgufOptions = {}): Promise<GgufFile> {
  const { root, ...names } = folderOptionNames
  checkOptions('readGguf', options, { ...names, maxHeaderBytes: true })
  const file = await openFile('readGguf', path, options)
  try {
    return new GgufFile(file, await readHeader(file, options.maxHeaderBytes ?? 2 ** 26))
  } catch (error) {
    await file.close()
    throw error
  }
}

/** An open GGUF file, returned by {@link readGguf}. It keeps a file descriptor open until you close it. */
export class GgufFile {
  /** Path or URL of the file. */
  readonly path: string
  /** Version of the format: 2 or 3. */
  readonly version: number
  /** Metadata by key, in the order of the file. */
  readonly metadata: ReadonlyMap<string, GgufValue>
  /** Tensors by name, in the order of the file. */
  readonly tensors: ReadonlyMap<string, GgufTensorInfo>
  #file: OpenFile | undefined

  /** @internal */
  constructor(file: OpenFile, header: GgufHeader) {
    this.path = file.path
    this.version = header.version
    this.metadata = header.metadata
    this.tensors = header.tensors
    this.#file = file
  }

  /** Reads the bytes of a tensor as stored. @throws {MoeError} `E_CHECKPOINT` if there is no such tensor, the file is closed, or it was truncated since it was opened */
  async read(name: string): Promise<Uint8Array<ArrayBuffer>> {
    const info = this.tensors.get(name)
    if (!info) throw missingTensor(this.path, name, this.tensors.keys())
    if (!this.#file) throw checkpointError(this.path, 'the file is closed', 'read before close()', { key: name })
    return readRange(this.#file, info.begin, info.bytes)
  }

  /** Reads a tensor as f32, row-major. @throws {MoeError} `E_CHECKPOINT` as `read`, and for types other than f32, f16, bf16, q8_0 and q4_0 */
  async readF32(name: string): Promise<Float32Array> {
    const bytes = await this.read(name)
    const { type } = this.tensors.get(name) as GgufTensorInfo
    const values = decodeGguf(type, bytes)
    if (values) return values
    throw checkpointError(this.path, `tensor ${shown(name)} has type ${type}`, 'use read() and decode it yourself', {
      key: name,
    })
  }

  /** Closes the file; later reads throw `E_CHECKPOINT`. May be called more than once. */
  async close(): Promise<void> {
    const file = this.#file
    this.#file = undefined
    await file?.close()
  }

  /** `close()`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}

/** The length of the header is not known in advance, so it is parsed from more and more bytes until they suffice. */
async function readHeader(file: OpenFile, limit: number): Promise<GgufHeader> {
  const { path, bytes: fileBytes } = file
  for (let size = 2 ** 20; ; size *= 4) {
    const bytes = await readRange(file, 0, Math.min(size, limit, fileBytes))
    try {
      return parseHeader(path, bytes, fileBytes)
    } catch (cause) {
      if (cause instanceof NeedsMoreBytes) {
        if (bytes.length < limit) continue
        const fix = 'pass a larger maxHeaderBytes if you trust the file'
        throw checkpointError(path, `its header exceeds the limit of ${limit} bytes`, fix)
      }
      if (!(cause instanceof RangeError || cause instanceof TypeError)) throw cause
      throw checkpointError(path, `the header ${cause.message}`, 'the file is corrupt or truncated', {}, cause)
    }
  }
}

/** Minimum size of a metadata entry (empty key, type, one byte) and of a tensor record (empty name, no sizes). */
const ENTRY_BYTES = 13
const RECORD_BYTES = 24

function parseHeader(path: string, bytes: Uint8Array, fileBytes: number): GgufHeader {
  const reader = new ByteReader(bytes, fileBytes)
  const version = checkedVersion(path, reader, fileBytes)
  const tensorCount = reader.count('tensors', RECORD_BYTES)
  const entryCount = reader.count('metadata entries', ENTRY_BYTES)
  const metadata = new Map<string, GgufValue>()
  for (let i = 0; i < entryCount; i++) {
    const key = reader.string()
    if (metadata.has(key)) throw checkpointError(path, `duplicate metadata key ${shown(key)}`)
    metadata.set(key, reader.value())
  }
  const records = []
  for (let i = 0; i < tensorCount; i++) records.push(readRecord(path, reader))
  const alignment = alignmentOf(path, metadata.get('general.alignment'))
  const start = reader.at + padding(reader.at, alignment)
  const tensors = new Map<string, GgufTensorInfo>()
  for (const { name, offset, ...record } of records) {
    if (tensors.has(name)) throw checkpointError(path, `duplicate tensor ${shown(name)}`)
    if (offset % alignment !== 0) {
      throw checkpointError(path, `tensor ${shown(name)} has offset ${offset}, not a multiple of ${alignment}`)
    }
    const begin = start + offset
    if (begin + record.bytes > fileBytes) {
      const problem = `tensor ${shown(name)} ends at byte ${begin + record.bytes}, but the file has ${fileBytes}`
      throw checkpointError(path, problem, 'the file is truncated or corrupt')
    }
    tensors.set(name, { ...record, begin })
  }
  refuseOverlaps(path, tensors)
  return { version, metadata, tensors }
}

function checkedVersion(path: string, reader: ByteReader, fileBytes: number): number {
  if (fileBytes < 24) throw checkpointError(path, `${fileBytes} bytes are too few for a GGUF file`)
  if (reader.u32() !== MAGIC) throw checkpointError(path, 'the file does not start with "GGUF"', 'not a GGUF file')
  const version = reader.u32()
  if (version === 2 || version === VERSION) return version
  if (version > 0xffff)
    throw checkpointError(path, 'its numbers are big-endian', 'only little-endian files are supported')
  throw checkpointError(path, `unsupported GGUF version ${version}`, `versions 2 and ${VERSION} are supported`)
}

function readRecord(path: string, reader: ByteReader) {
  const name = reader.string()
  const refuse = (problem: string) =>
    checkpointError(path, `tensor ${shown(name)} ${problem}`, undefined, { key: name })
  if (new TextEncoder().encode(name).length > MAX_NAME_BYTES)
    throw refuse(`has a name of more than ${MAX_NAME_BYTES} bytes`)
  const dimensions = reader.u32()
  if (dimensions > MAX_DIMENSIONS) throw refuse(`has ${dimensions} dimensions, at most ${MAX_DIMENSIONS} are allowed`)
  const sizes = Array.from({ length: dimensions }, () => reader.number('u64') as bigint)
  const id = reader.u32()
  const type = tensorTypeOfId(id)
  if (type === undefined) throw refuse(`has the unsupported element type ${id}`)
  const offset = reader.number('u64') as bigint
  const shape = sizes.map(Number).toReversed()
  const bytes = tensorBytes(type, shape)
  if (Number.isNaN(bytes)) throw refuse(`of type ${type} has the invalid shape [${sizes.toReversed().join(', ')}]`)
  if (offset > BigInt(Number.MAX_SAFE_INTEGER)) throw refuse(`has the invalid offset ${offset}`)
  return { name, type, shape, bytes, offset: Number(offset) }
}

function refuseOverlaps(path: string, tensors: ReadonlyMap<string, GgufTensorInfo>): void {
  let end = 0
  let last = ''
  for (const [name, { begin, bytes }] of [...tensors].sort(([, a], [, b]) => a.begin - b.begin || a.bytes - b.bytes)) {
    if (begin < end) throw checkpointError(path, `tensors ${shown(last)} and ${shown(name)} overlap`)
    end = begin + bytes
    last = name
  }
}
