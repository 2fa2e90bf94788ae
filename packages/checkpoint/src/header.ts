/**
 * @file The header of a safetensors file: read without trusting it, and written.
 *
 * A file is an 8-byte little-endian length N, N bytes of JSON, then the tensors' bytes. The JSON maps each name to
 * `{ dtype, shape, data_offsets: [begin, end] }` relative to the end of the header, and `__metadata__` to strings. The
 * tensors must cover the data exactly: no overlap, no hole, nothing after the last one (as the format's own
 * implementation, huggingface/safetensors `safetensors/src/tensor.rs`, demands).
 */

import { checkpointError, shown } from './checkpoint-error.ts'
import { dtypeOfName, type StoredDType, storedBytes, storedName, storedNames } from './stored-dtype.ts'
import { parseStrictJson } from './strict-json.ts'

/** Bytes of the length in front of the header. */
export const PREFIX_BYTES = 8

/**
 * Largest header that is read unless the caller allows more: room for about 200,000 tensors (DeepSeek-V3 as one file would
 * need 14 MB). The format's own limit is 100 MB.
 */
export const DEFAULT_MAX_HEADER_BYTES = 32 * 2 ** 20

/** Where one tensor lies in its file. */
export interface HeaderEntry {
  readonly name: string
  readonly dtype: StoredDType
  readonly shape: readonly number[]
  /** First byte, counted from the start of the file. */
  readonly begin: number
  readonly bytes: number
}

export interface Header {
  /** By name, in the order of the file. */
  readonly entries: ReadonlyMap<string, HeaderEntry>
  readonly metadata: Readonly<Record<string, string>>
}

/**
 * Length of the header, checked against the file that claims it.
 *
 * @param prefix the first 8 bytes of the file, fewer if it is shorter
 * @throws {MoeError} `E_CHECKPOINT`
 */
export function headerLength(file: string, prefix: Uint8Array, fileBytes: number, maxHeaderBytes: number): number {
  if (prefix.length < PREFIX_BYTES) {
    throw checkpointError(file, `${fileBytes} bytes are too few for a safetensors file`, 'it may be truncated')
  }
  const view = new DataView(prefix.buffer, prefix.byteOffset, PREFIX_BYTES)
  const length = view.getBigUint64(0, true)
  if (length > BigInt(maxHeaderBytes)) {
    throw checkpointError(
      file,
      `its header claims ${length} bytes, more than the ${maxHeaderBytes} allowed`,
      'it is not a safetensors file, or pass a larger maxHeaderBytes if you trust it',
      { headerBytes: String(length), maxHeaderBytes },
    )
  }
  if (PREFIX_BYTES + Number(length) > fileBytes) {
    throw checkpointError(
      file,
      `its header claims ${length} bytes, but the file has ${fileBytes}`,
      'it is truncated, or not a safetensors file',
      { headerBytes: Number(length), fileBytes },
    )
  }
  if (length < 2n) throw checkpointError(file, `its header has ${length} bytes`, 'it is not a safetensors file')
  return Number(length)
}

/**
 * Parses and checks a header. After it returns, every entry lies inside the file and has as many bytes as its dtype and
 * shape need.
 *
 * @param json the header's bytes, without the length in front
 * @throws {MoeError} `E_CHECKPOINT`, naming the file, the tensor and the fault
 */
export function parseHeader(file: string, json: Uint8Array, fileBytes: number): Header {
  if (json[0] !== 0x7b) {
    throw checkpointError(file, 'its header does not start with "{"', 'it is not a safetensors file')
  }
  let document: Record<string, unknown>
  try {
    document = parseStrictJson(json, 4) as Record<string, unknown>
  } catch (cause) {
    throw checkpointError(file, `its header cannot be read: ${(cause as Error).message}`, undefined, {}, cause)
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
  if (!isObject(value)) throw refuse('is not described by an object')
  const { dtype: dtypeName, shape, data_offsets: offsets } = value
  const dtype = typeof dtypeName === 'string' ? dtypeOfName(dtypeName) : undefined
  if (!dtype) {
    throw refuse(`has the unknown dtype ${shown(dtypeName)}; known are ${storedNames().join(' ')}`)
  }
  if (!isSizes(shape)) {
    throw refuse(`has the shape ${shown(shape)}, not a list of whole numbers from 0`)
  }
  if (!isSizes(offsets) || offsets.length !== 2) {
    throw refuse(`has the data_offsets ${shown(offsets)}, not two whole numbers from 0`)
  }
  const [begin, end] = offsets
  if (begin > end) throw refuse(`begins at ${begin}, after its end at ${end}`, { begin, end })
  if (end > dataBytes) {
    throw refuse(`ends at byte ${end} of the data, which has ${dataBytes}; the file is truncated or damaged`, { end })
  }
  const bytes = storedBytes(dtype, shape)
  if (bytes !== end - begin) {
    const need = Number.isNaN(bytes) ? 'an impossible number of' : bytes
    throw refuse(`has ${end - begin} bytes, but ${dtypeName} ${shown(shape)} needs ${need}`, { shape })
  }
  return { name, dtype, shape, begin: dataStart + begin, bytes }
}

/** Entries sorted by their begin must follow each other from the start of the data to its end. */
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

/** What a header says about a tensor to be written. */
export interface PlannedEntry {
  readonly name: string
  readonly dtype: StoredDType
  readonly shape: readonly number[]
  readonly bytes: number
}

/**
 * The bytes in front of the data: length and JSON, padded with spaces so that the data begins at a multiple of 8. The
 * tensors are laid out in the given order.
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
