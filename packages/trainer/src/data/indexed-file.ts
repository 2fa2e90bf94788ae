/**
 * @file Megatron-LM's indexed dataset format (megatron/core/datasets/indexed_dataset.py): token ids in `NAME.bin`, and
 *   in `NAME.idx` their division into sequences and documents. Little-endian: magic, u64 version, u8 id type, u64 number
 *   of sequences, u64 number of document indices; then i32 lengths, i64 byte positions, and i64 indices of the first
 *   sequence of each document, followed by the number of sequences.
 */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs'
import { isMoeError, MoeError } from '@moe/core'

const MAGIC = 'MMIDIDX\0\0'
const HEADER_BYTES = 34
/** Id types by Megatron's codes. It defines more, but writes these. */
const idTypes = { 4: Int32Array, 8: Uint16Array } as const

type Ids = Int32Array | Uint16Array
/** Positions in a file, in 32 bits if they fit. */
type Positions = Uint32Array | Float64Array

/** Largest vocabulary whose ids fit into 16 bits. */
const SHORT_IDS = 1 << 16

/** The id type for a vocabulary size. */
export const idTypeFor = (vocabSize: number) => (vocabSize <= SHORT_IDS ? Uint16Array : Int32Array)

/** Yields the content of a `NAME.idx` for documents of one sequence each. @param lengths in tokens */
export function* encodeIndex(lengths: Int32Array, idBytes: 2 | 4): Generator<Uint8Array> {
  const header = Buffer.alloc(HEADER_BYTES)
  header.write(MAGIC, 'latin1')
  header.writeBigUInt64LE(1n, 9)
  header.writeUInt8(idBytes === 2 ? 8 : 4, 17)
  header.writeBigUInt64LE(BigInt(lengths.length), 18)
  header.writeBigUInt64LE(BigInt(lengths.length + 1), 26)
  yield header
  yield new Uint8Array(lengths.buffer, lengths.byteOffset, lengths.byteLength)
  let bytes = 0
  yield* int64s(lengths.length, i => {
    const start = bytes
    bytes += lengths[i] * idBytes
    return start
  })
  yield* int64s(lengths.length + 1, i => i)
}

/** Integers as 64 bits each. */
function* int64s(count: number, at: (i: number) => number): Generator<Uint8Array> {
  const most = 1 << 16
  for (let from = 0; from < count; from += most) {
    const part = Buffer.alloc(8 * Math.min(most, count - from))
    for (let i = 0; i < part.length / 8; i++) {
      const value = at(from + i)
      part.writeUInt32LE(value % 2 ** 32, 8 * i)
      part.writeUInt32LE(Math.floor(value / 2 ** 32), 8 * i + 4)
    }
    yield part
  }
}

/** A pair of files, open for reading. Only the starts of the documents are kept in memory. */
export class IndexedFile {
  /** Path without `.bin` and `.idx`. */
  readonly path: string
  /** Number of tokens. */
  readonly length: number
  /** Start of each document that is not empty. */
  readonly starts: Positions
  readonly #type: (typeof idTypes)[keyof typeof idTypes]
  #bin: number | null = null
  #scratch: Ids

  /** @throws MoeError E_DATA for files that are missing, truncated or of another format */
  constructor(path: string) {
    this.path = path
    const { type, length, starts } = withFile(`${path}.idx`, (file, size) => readIndex(`${path}.idx`, file, size))
    this.#type = type
    this.length = length
    this.starts = starts
    this.#scratch = new type(0)
    const bytes = withFile(`${path}.bin`, (_, size) => size)
    const expected = length * type.BYTES_PER_ELEMENT
    if (bytes !== expected) {
      const fix = bytes < expected ? 'copy or create it again: it is truncated' : 'use the .idx that belongs to it'
      throw broken(`${path}.bin`, `the file has ${bytes} bytes, but its index describes ${expected}`, fix)
    }
  }

  /**
   * Reads `count` tokens at position `from` into `target` at `at`. @throws MoeError E_DATA for ids outside the
   * vocabulary
   */
  read(target: Int32Array, at: number, from: number, count: number, vocabSize: number): void {
    this.#bin ??= opened(`${this.path}.bin`)
    if (this.#scratch.length < count) this.#scratch = new this.#type(count)
    const ids = this.#scratch.subarray(0, count)
    readFully(`${this.path}.bin`, this.#bin, ids, from * ids.BYTES_PER_ELEMENT)
    for (let i = 0; i < count; i++) {
      const id = ids[i]
      if (id < 0 || id >= vocabSize) {
        throw broken(
          `${this.path}.bin`,
          `token ${from + i} is ${id}, outside the vocabulary of ${vocabSize} ids`,
          'use the tokenizer and the vocabulary size with which the file was created',
        )
      }
      target[at + i] = id
    }
  }

  close(): void {
    if (this.#bin !== null) closeSync(this.#bin)
    this.#bin = null
  }
}

function readIndex(path: string, file: number, size: number) {
  const header = Buffer.alloc(Math.min(HEADER_BYTES, size))
  readFully(path, file, header, 0)
  if (header.length < HEADER_BYTES || header.toString('latin1', 0, MAGIC.length) !== MAGIC)
    throw broken(path, 'not an index file of Megatron-LM', 'pass files that tokenize or Megatron-LM wrote')
  const version = header.readBigUInt64LE(9)
  if (version !== 1n) throw broken(path, `unsupported version ${version}, expected 1`)
  const code = header.readUInt8(17)
  const type = idTypes[code as keyof typeof idTypes]
  if (type === undefined) throw broken(path, `unsupported id type ${code}, expected 8 (uint16) or 4 (int32)`)
  const sequences = Number(header.readBigUInt64LE(18))
  const documents = Number(header.readBigUInt64LE(26))
  const expected = HEADER_BYTES + 12 * sequences + 8 * documents
  // Megatron appends one byte per sequence if sequences have modes.
  if (size !== expected && size !== expected + sequences)
    throw broken(
      path,
      `the file has ${size} bytes, but ${sequences} sequences in ${documents - 1} documents need ${expected}`,
    )
  const lengths = new Column(path, file, HEADER_BYTES, 4)
  const pointers = new Column(path, file, HEADER_BYTES + 4 * sequences, 8)
  const indices = new Column(path, file, HEADER_BYTES + 12 * sequences, 8)
  const tokens = tokensOf(path, lengths, sequences)
  const starts: Positions = tokens < 2 ** 32 ? new Uint32Array(documents) : new Float64Array(documents)
  let begun = 0
  let read = 0
  const ordered = () => broken(path, 'its documents do not cover the sequences in order')
  if (documents < 1 || indices.next() !== 0) throw ordered()
  let next = 0
  let position = 0
  lengths.rewind()
  for (let sequence = 0; sequence < sequences; sequence++) {
    // Documents without a sequence start at the same place as the next one.
    const begins = next === sequence
    while (next === sequence) {
      if (++read >= documents) throw ordered()
      next = indices.next()
      if (next < sequence) throw ordered()
    }
    if (pointers.next() !== position * type.BYTES_PER_ELEMENT)
      throw broken(path, `sequence ${sequence} does not start where the previous one ends`)
    if (begins && (begun === 0 || starts[begun - 1] !== position)) starts[begun++] = position
    position += lengths.next()
  }
  while (++read < documents) if (indices.next() !== sequences) throw ordered()
  if (next !== sequences) throw ordered()
  while (begun > 0 && starts[begun - 1] === tokens) begun--
  return { type, length: tokens, starts: begun === documents ? starts : starts.slice(0, begun) }
}

function tokensOf(path: string, lengths: Column, sequences: number): number {
  let tokens = 0
  for (let sequence = 0; sequence < sequences; sequence++) {
    const length = lengths.next()
    if (length >= 2 ** 31) throw broken(path, `sequence ${sequence} has a negative length`)
    tokens += length
  }
  return tokens
}

/** Reads consecutive numbers from a part of a file. */
class Column {
  readonly #path: string
  readonly #file: number
  readonly #offset: number
  /** 32 bits each; 64-bit numbers have the lower half first. */
  readonly #words: Uint32Array
  readonly #wide: boolean
  #read = 0
  #at = 0
  #end = 0

  constructor(path: string, file: number, offset: number, bytes: 4 | 8) {
    this.#path = path
    this.#file = file
    this.#offset = offset
    this.#words = new Uint32Array(1 << 16)
    this.#wide = bytes === 8
  }

  next(): number {
    if (this.#at === this.#end) this.#fill()
    const low = this.#words[this.#at++]
    return this.#wide ? low + this.#words[this.#at++] * 2 ** 32 : low
  }

  rewind(): void {
    this.#read = 0
    this.#at = 0
    this.#end = 0
  }

  #fill(): void {
    const bytes = readSync(this.#file, this.#words, 0, this.#words.byteLength, this.#offset + this.#read)
    if (bytes < 8 && bytes !== 4) throw broken(this.#path, 'the file is truncated')
    // What is read beyond the end of the column is never used.
    this.#end = (bytes >> 3) * 2 || 1
    this.#at = 0
    this.#read += this.#end * 4
  }
}

function readFully(path: string, file: number, target: NodeJS.ArrayBufferView, position: number): void {
  const { byteLength } = target
  for (let done = 0; done < byteLength; ) {
    const bytes = readSync(file, target, done, byteLength - done, position + done)
    if (bytes === 0) throw broken(path, 'the file is truncated', 'copy or create it again')
    done += bytes
  }
}

function opened(path: string): number {
  try {
    return openSync(path, 'r')
  } catch (cause) {
    throw broken(path, `cannot read the file: ${(cause as Error).message}`, undefined, cause)
  }
}

function withFile<T>(path: string, use: (file: number, size: number) => T): T {
  const file = opened(path)
  try {
    return use(file, fstatSync(file).size)
  } catch (cause) {
    if (isMoeError(cause)) throw cause
    throw broken(path, `cannot read the file: ${(cause as Error).message}`, undefined, cause)
  } finally {
    closeSync(file)
  }
}

const broken = (path: string, problem: string, fix?: string, cause?: unknown) =>
  new MoeError({ code: 'E_DATA', op: 'tokenFiles', problem: `${path}: ${problem}`, fix, cause, details: { path } })
