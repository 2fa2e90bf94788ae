/** @file Streams the documents of a file: text, JSON lines or Parquet, possibly compressed. */
import { isUtf8 } from 'node:buffer'
import { createReadStream, type ReadStream, statSync } from 'node:fs'
import type { Transform } from 'node:stream'
// The default import, because bundlers turn functions of a namespace into named imports, and Node 20 has no
// `createZstdDecompress` to import.
import zlib from 'node:zlib'
import { MoeError } from '@moe/core'
import { parquetTexts } from './parquet.ts'
import { type Texts, textOf, unreadable } from './record.ts'

/** How files become documents. */
export interface SourceOptions {
  /** Separator of the documents of a text file. Default: each file is a document. */
  readonly separator: string | undefined
  /** Field or column that contains the text. */
  readonly field: string
}

/** Maximum size of a document in bytes; it must fit into a string. */
const LARGEST_DOCUMENT = 2 ** 28
const CHUNK_BYTES = 1 << 22

/**
 * Yields the documents of a file, starting at a position.
 *
 * @throws MoeError E_DATA for a file whose content does not match its name
 */
export async function* readTexts(path: string, from: number, options: SourceOptions): AsyncGenerator<Texts> {
  try {
    const kind = path.replace(/\.(gz|zst)$/i, '')
    if (/\.parquet$/i.test(path)) yield* parquetTexts(path, from, options.field)
    else if (/\.(jsonl|ndjson)$/i.test(kind)) yield* jsonTexts(path, from, options.field)
    else yield* plainTexts(path, from, options.separator)
  } catch (cause) {
    if (cause instanceof MoeError) throw cause
    throw unreadable(path, `cannot read the file: ${(cause as Error).message}`, undefined, cause)
  }
}

async function* jsonTexts(path: string, from: number, field: string): AsyncGenerator<Texts> {
  for await (const { text, at, next, bytesRead } of parts(path, from, '\n')) {
    const lines = text.split('\n')
    const place = (line: number) => at + Buffer.byteLength(lines.slice(0, line).join('\n')) + (line > 0 ? 1 : 0)
    const texts = lines.flatMap((line, i) => {
      if (line.trim() === '') return []
      let value: unknown
      try {
        value = JSON.parse(line)
      } catch (cause) {
        throw unreadable(
          path,
          `the line at byte ${place(i)} is not JSON: ${(cause as Error).message}`,
          undefined,
          cause,
        )
      }
      return textOf(path, value, field, () => `the line at byte ${place(i)}`)
    })
    yield { texts, next, bytesRead }
  }
}

async function* plainTexts(path: string, from: number, separator: string | undefined): AsyncGenerator<Texts> {
  const own = separator && (await asIn(path, separator))
  for await (const { text, at, next, bytesRead } of parts(path, from, own)) {
    const nul = text.indexOf('\0')
    if (nul >= 0) {
      const byte = at + Buffer.byteLength(text.slice(0, nul))
      throw unreadable(path, `the file is binary: byte ${byte} is NUL`, 'leave it out of the patterns')
    }
    const texts = own === undefined ? [text] : text.split(own).filter(part => part.trim() !== '')
    yield { texts: texts.filter(part => part !== ''), next, bytesRead }
  }
}

interface Part {
  /** Complete documents, without the separator after the last. */
  readonly text: string
  /** Byte offset of the text. */
  readonly at: number
  readonly next: number
  readonly bytesRead: number
}

/** Yields parts of a UTF-8 file that end at document boundaries. */
async function* parts(path: string, from: number, separator: string | undefined): AsyncGenerator<Part> {
  const ends = Buffer.from(separator ?? '')
  let held: Buffer = Buffer.alloc(0)
  let at = from
  const part = (bytes: Buffer, next: number, bytesRead: number): Part => {
    if (!isUtf8(bytes))
      throw unreadable(path, `not UTF-8 text after byte ${at}`, 'convert it to UTF-8, or leave it out')
    const text = bytes.toString('utf8')
    return { text: at === 0 && text.startsWith('\uFEFF') ? text.slice(1) : text, at, next, bytesRead }
  }
  for await (const { chunk, bytesRead } of bytesOf(path, from)) {
    const searched = Math.max(0, held.length - ends.length + 1)
    held = held.length === 0 ? chunk : Buffer.concat([held, chunk])
    const last = separator === undefined ? -1 : held.lastIndexOf(ends)
    if (last < searched) {
      if (held.length <= LARGEST_DOCUMENT) continue
      const fix =
        separator === undefined
          ? 'pass the separator of its documents: --separator TEXT, { separator }'
          : 'split it into smaller documents'
      throw unreadable(path, `the document at byte ${at} has more than ${LARGEST_DOCUMENT} bytes`, fix)
    }
    const next = at + last + ends.length
    yield part(held.subarray(0, last), next, bytesRead)
    held = held.subarray(last + ends.length)
    at = next
  }
  if (held.length > 0) yield part(held, at + held.length, Number.POSITIVE_INFINITY)
}

/** A separator with the line ends of the file, CRLF or LF, judged by the file's first line. */
async function asIn(path: string, separator: string): Promise<string> {
  for await (const { chunk } of bytesOf(path, 0)) {
    const crlf = chunk[chunk.indexOf('\n') - 1] === 13
    return crlf ? separator.replaceAll(/\r?\n/g, '\r\n') : separator
  }
  return separator
}

interface Chunk {
  readonly chunk: Buffer
  /** Bytes of the (compressed) file read so far. */
  readonly bytesRead: number
}

/** Yields the content of a file from a byte on. A compressed file is decompressed from the beginning. */
async function* bytesOf(path: string, from: number): AsyncGenerator<Chunk> {
  const packing = /\.(gz|zst)$/i.exec(path)?.[1].toLowerCase()
  if (packing === undefined) {
    yield* streamed(createReadStream(path, { highWaterMark: CHUNK_BYTES, start: from }), from)
    return
  }
  let left = from
  for await (const { chunk, bytesRead } of packing === 'gz' ? unzipped(path) : unzstd(path)) {
    const kept = chunk.subarray(Math.min(left, chunk.length))
    left -= chunk.length - kept.length
    if (kept.length > 0) yield { chunk: kept, bytesRead }
  }
}

async function* unzipped(path: string): AsyncGenerator<Chunk> {
  yield* streamed(
    createReadStream(path, { highWaterMark: CHUNK_BYTES }),
    0,
    zlib.createGunzip({ chunkSize: CHUNK_BYTES }),
  )
}

/** Decompresses a file of one or several Zstandard frames. Node's zlib stops after the first frame. */
async function* unzstd(path: string): AsyncGenerator<Chunk> {
  // Since Node 22.15.
  if (zlib.createZstdDecompress === undefined) throw noZstandard(path)
  const { size } = statSync(path)
  for (let start = 0; start < size; ) {
    const frame = zlib.createZstdDecompress({ chunkSize: CHUNK_BYTES })
    yield* streamed(createReadStream(path, { highWaterMark: CHUNK_BYTES, start }), start, frame)
    if (frame.bytesWritten === 0) throw unreadable(path, `there is no Zstandard frame at byte ${start}`)
    start += frame.bytesWritten
  }
}

/** Yields the chunks of a file from `start` on, decompressed if `unpack` is given. */
async function* streamed(file: ReadStream, start: number, unpack?: Transform): AsyncGenerator<Chunk> {
  if (unpack !== undefined) file.on('error', error => unpack.destroy(error))
  const stream = unpack === undefined ? file : file.pipe(unpack)
  try {
    for await (const chunk of stream as AsyncIterable<Buffer>) yield { chunk, bytesRead: start + file.bytesRead }
  } finally {
    file.destroy()
    stream.destroy()
  }
}

const noZstandard = (path: string) =>
  new MoeError({
    code: 'E_UNSUPPORTED',
    op: 'tokenize',
    problem: `Node ${process.version} cannot decompress Zstandard, which ${path} needs`,
    fix: 'use Node 22.15 or newer, or decompress it with zstd -d',
  })
