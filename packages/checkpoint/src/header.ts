/**
 * @file Parses and validates the header of a safetensors file, and encodes it.
 *
 * A file consists of an 8-byte little-endian length N, N bytes of JSON, and the data of the tensors. The JSON maps each name to
 * `{ dtype, shape, data_offsets: [begin, end] }`, relative to the end of the header, and `__metadata__` to strings. The tensors must
 * cover the data exactly, without overlaps, gaps or trailing bytes, as the format's own implementation requires
 * (huggingface/safetensors `safetensors/src/tensor.rs`).
 */

import { checkpointError, shown } from './checkpoint-error.ts'
import { dtypeOfName, type StoredDType, storedBytes, storedName, storedNames } from './stored-dtype.ts'
import { parseStrictJson } from './strict-json.ts'

/** Size of the header length at the start of the file. */
export const PREFIX_BYTES = 8

/**
 * Default limit of the header size: enough for about 200,000 tensors (DeepSeek-V3 as one file would need 14 MB). The format's own limit
 * is 100 MB.
 */
export const DEFAULT_MAX_HEADER_BYTES = 32 * 2 ** 20

/** The position of a tensor in its file. */
export interface HeaderEntry {
  readonly name: string
  readonly dtype: StoredDType
  readonly shape: readonly number[]
  /** Position of the first byte in the file. */
  readonly begin: number
  readonly bytes: number
}

export interface Header {
  /** Entries by name, in the order of the file. */
  readonly entries: ReadonlyMap<string, HeaderEntry>
  readonly metadata: Readonly<Record<string, string>>
}

/**
 * Returns the length of the header, checked against the size of the file.
 *
 * @param prefix the first 8 bytes of the file, or fewer if it is shorter
 * @throws {MoeError} `E_CHECKPOINT`
 */
export function headerLength(file: string, prefix: Uint8Array, fileBytes: number, maxHeaderBytes: number): number {
  if (prefix.length < PREFIX_BYTES) {
    throw checkpointError(file, `${fileBytes} bytes are too few for a safetensors file`, 'it may be truncated')
  }
  const view = new DataView(prefix.buffer, prefix.byteOffset, PREFIX_BYTES)
  const length = view.getBigUint64(0, true)
  // Negated, so that NaN is no limit that everything meets.
  if (!(Number(length) <= maxHeaderBytes)) {
    throw checkpointError(
      file,
      `its header claims ${length} bytes, more than the limit of ${maxHeaderBytes}`,
      'not a safetensors file, or, if you trust it, pass a larger maxHeaderBytes',
      { headerBytes: String(length), maxHeaderBytes },
    )
  }
  if (PREFIX_BYTES + Number(length) > fileBytes) {
    throw checkpointError(
      file,
      `its header claims ${length} bytes, but the file has only ${fileBytes}`,
      'the file is truncated, or not a safetensors file',
      { headerBytes: Number(length), fileBytes },
    )
  }
  if (length < 2n) throw checkpointError(file, `its header has only ${length} bytes`, 'not a safetensors file')
  return Number(length)
}

/**
 * Parses and validates a header. Every returned entry lies within the file and has the size that its dtype and shape require.
 *
 * @param json the bytes of the header, without the length
 * @throws {MoeError} `E_CHECKPOINT`, naming the file, the tensor and the problem
 */
export function parseHeader(file: string, json: Uint8Array, fileBytes: number): Header {
  if (json[0] !== 0x7b) {
    throw checkpointError(file, 'its header does not start with "{"', 'not a safetensors file')
  }
  let document: Record<string, unknown>
  try {
    document = parseStrictJson(json, 4) as Record<string, unknown>
  } catch (cause) {
    throw checkpointError(file, `its header is invalid: ${(cause as Error).message}`, undefined, {}, cause)
  }
  const dataStart = PREFIX_BYTES + json.length
  const dataBytes = fileBytes - dataStart
  const entries: HeaderEntry[] = []
  let metadata: Record<string, string> = {}
  for (const name of Object.keys(document)) {
    if (name === '__metadata__') metadata = parseMetadata(file, document[name])
    else entries.push(parseEntry(file, name, document[name], dataStart, dataBytes))
  }
  entries.sort((a, b) => a.begin - b.begin || a.bytes - b.bytes)
  checkCoverage(file, entries, dataStart, fileBytes)
  return { entries: new Map(entries.map(entry => [entry.name, entry])), metadata }
}

function parseMetadata(file: string, value: unknown): Record<string, string> {
  if (!isObject(value) || Object.values(value).some(text => typeof text !== 'string')) {
    throw checkpointError(file, '__metadata__ is not an object of strings')
  }
  return value as Record<string, string>
}

function parseEntry(file: string, name: string, value: unknown, dataStart: number, dataBytes: number): HeaderEntry {
  const refuse = (problem: string, details: Record<string, unknown> = {}) =>
    checkpointError(file, `tensor ${shown(name)} ${problem}`, undefined, { key: name, ...details })
  if (!isObject(value)) throw refuse(`is described by ${shown(value)}, expected an object`)
  const { dtype: dtypeName, shape, data_offsets: offsets } = value
  const dtype = typeof dtypeName === 'string' ? dtypeOfName(dtypeName) : undefined
  if (!dtype) {
    throw refuse(`has the unknown dtype ${shown(dtypeName)}; known are ${storedNames().join(', ')}`)
  }
  if (!isSizes(shape)) {
    throw refuse(`has the shape ${shown(shape)}, expected an array of non-negative integers`)
  }
  if (!isSizes(offsets) || offsets.length !== 2) {
    throw refuse(`has the data_offsets ${shown(offsets)}, expected two non-negative integers`)
  }
  const [begin, end] = offsets
  if (begin > end) throw refuse(`begins at ${begin}, after its end at ${end}`, { begin, end })
  if (end > dataBytes) {
    throw refuse(`ends at byte ${end} of ${dataBytes} bytes of data; the file is truncated or corrupt`, { end })
  }
  const bytes = storedBytes(dtype, shape)
  if (bytes !== end - begin) {
    const need = Number.isNaN(bytes) ? 'is too large or not a whole number of bytes' : `needs ${bytes}`
    throw refuse(`has ${end - begin} bytes, but ${dtypeName} ${shown(shape)} ${need}`, { shape })
  }
  return { name, dtype, shape, begin: dataStart + begin, bytes }
}

/** Checks that entries sorted by position cover the data from start to end. */
function checkCoverage(file: string, entries: readonly HeaderEntry[], dataStart: number, fileBytes: number): void {
  let position = dataStart
  let previous = 'the header'
  for (const { name, begin, bytes } of entries) {
    const here = shown(name)
    if (begin < position) {
      throw checkpointError(file, `tensor ${here} overlaps ${previous}`, undefined, { key: name })
    }
    if (begin > position) {
      throw checkpointError(
        file,
        `${begin - position} bytes between ${previous} and tensor ${here} belong to no tensor`,
      )
    }
    position += bytes
    previous = `tensor ${here}`
  }
  if (position !== fileBytes) {
    throw checkpointError(file, `${fileBytes - position} bytes after ${previous} belong to no tensor`)
  }
}

/** A tensor to be written, for the header. */
export interface PlannedEntry {
  readonly name: string
  readonly dtype: StoredDType
  readonly shape: readonly number[]
  readonly bytes: number
}

/**
 * Encodes the length and the JSON of a header, padded with spaces so that the data starts at a multiple of 8. Tensors are laid out in
 * the given order.
 */
export function encodeHeader(entries: readonly PlannedEntry[], metadata: Readonly<Record<string, string>>): Uint8Array {
  const fields: string[] = []
  if (Object.keys(metadata).length > 0) fields.push(`"__metadata__":${JSON.stringify(metadata)}`)
  let offset = 0
  for (const { name, dtype, shape, bytes } of entries) {
    const info = { dtype: storedName(dtype), shape, data_offsets: [offset, offset + bytes] }
    fields.push(`${JSON.stringify(name)}:${JSON.stringify(info)}`)
    offset += bytes
  }
  const json = new TextEncoder().encode(`{${fields.join(',')}}`)
  const padded = Math.ceil(json.length / 8) * 8
  const out = new Uint8Array(PREFIX_BYTES + padded).fill(0x20)
  new DataView(out.buffer).setBigUint64(0, BigInt(padded), true)
  out.set(json, PREFIX_BYTES)
  return out
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

const isSizes = (value: unknown): value is number[] =>
  Array.isArray(value) && value.every(size => Number.isSafeInteger(size) && size >= 0 && !Object.is(size, -0))
