/** @file Writes a stream of documents into shards, so that a killed process loses nothing that was saved. */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { type FileHandle, open, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { flushFile } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { encodeIndex, idTypeFor } from '../data/indexed-file.ts'
import type { PartRecord, ShardRecord } from '../data/token-manifest.ts'

/** The progress of a part. */
export interface PartState extends PartRecord {
  /** The unfinished shard. Anything beyond this in its files is discarded. */
  readonly open: { readonly tokens: number; readonly documents: number }
}

export const nothingWritten: PartState = {
  tokens: 0,
  documents: 0,
  textBytes: 0,
  shards: [],
  open: { tokens: 0, documents: 0 },
}

/** Extension of the file with the document lengths of an unfinished shard. */
const LENGTHS_ENDING = '.lengths'

interface OpenShard {
  readonly path: string
  readonly bin: FileHandle
  readonly lengths: FileHandle
}

export class PartWriter {
  readonly #folder: string
  readonly #name: string
  readonly #Ids: ReturnType<typeof idTypeFor>
  readonly #shardTokens: number
  readonly #shards: ShardRecord[]
  #shard: OpenShard | null = null
  #tokens: number
  #documents: number
  #textBytes: number
  #openTokens: number
  #openDocuments: number

  constructor(
    folder: string,
    name: string,
    { vocabSize, shardTokens }: { readonly vocabSize: number; readonly shardTokens: number },
    state: PartState,
  ) {
    this.#folder = folder
    this.#name = name
    this.#Ids = idTypeFor(vocabSize)
    this.#shardTokens = shardTokens
    this.#shards = [...state.shards]
    this.#tokens = state.tokens
    this.#documents = state.documents
    this.#textBytes = state.textBytes
    this.#openTokens = state.open.tokens
    this.#openDocuments = state.open.documents
  }

  get tokens(): number {
    return this.#tokens
  }

  get documents(): number {
    return this.#documents
  }

  /** Files that belong to the part. */
  get files(): string[] {
    const finished = this.#shards.flatMap(({ name }) => [`${name}.bin`, `${name}.idx`])
    const name = this.#shardName()
    return this.#openDocuments === 0 ? finished : [...finished, `${name}.bin`, `${name}${LENGTHS_ENDING}`]
  }

  #shardName(): string {
    return `${this.#name}-${String(this.#shards.length).padStart(5, '0')}`
  }

  /** Adds documents. A document is never split: a shard without room for it is finished. */
  async add(documents: readonly ArrayLike<number>[], textBytes: number): Promise<void> {
    for (let from = 0; from < documents.length; ) {
      let to = from
      let tokens = 0
      const room = this.#shardTokens - this.#openTokens
      while (to < documents.length && tokens + documents[to].length <= room) tokens += documents[to++].length
      // A document that is larger than a shard gets a shard of its own.
      if (to === from && this.#openTokens === 0) tokens += documents[to++].length
      if (to > from) await this.#write(documents.slice(from, to), tokens)
      if (to < documents.length) await this.#finishShard()
      from = to
    }
    this.#textBytes += textBytes
  }

  async #write(documents: readonly ArrayLike<number>[], tokens: number): Promise<void> {
    const ids = new this.#Ids(tokens)
    let at = 0
    for (const document of documents) {
      ids.set(document, at)
      at += document.length
    }
    const { bin, lengths } = await this.#opened()
    await writeAll(bin, ids, this.#openTokens * ids.BYTES_PER_ELEMENT)
    await writeAll(
      lengths,
      Int32Array.from(documents, ({ length }) => length),
      this.#openDocuments * 4,
    )
    this.#openTokens += tokens
    this.#openDocuments += documents.length
    this.#tokens += tokens
    this.#documents += documents.length
  }

  /** Opens the files of the unfinished shard, truncated to what was saved. */
  async #opened(): Promise<OpenShard> {
    if (this.#shard !== null) return this.#shard
    const path = join(this.#folder, this.#shardName())
    const bin = await reopened(`${path}.bin`, this.#openTokens * this.#Ids.BYTES_PER_ELEMENT)
    const lengths = await reopened(`${path}${LENGTHS_ENDING}`, this.#openDocuments * 4)
    this.#shard = { path, bin, lengths }
    return this.#shard
  }

  async #finishShard(): Promise<void> {
    const { path, bin, lengths } = await this.#opened()
    await Promise.all([flushFile(bin), flushFile(lengths)])
    await this.close()
    const bytes = await readFile(`${path}${LENGTHS_ENDING}`)
    const sizes = new Int32Array(bytes.buffer, bytes.byteOffset, this.#openDocuments)
    const idx = await writeIndex(`${path}.idx`, sizes, this.#Ids.BYTES_PER_ELEMENT as 2 | 4)
    const sha256 = { bin: await hashOf(`${path}.bin`), idx }
    this.#shards.push({ name: this.#shardName(), tokens: this.#openTokens, documents: this.#openDocuments, sha256 })
    this.#openTokens = 0
    this.#openDocuments = 0
  }

  /** Flushes to disk and returns the progress. */
  async save(): Promise<PartState> {
    if (this.#shard) await Promise.all([flushFile(this.#shard.bin), flushFile(this.#shard.lengths)])
    return { ...this.#record(), open: { tokens: this.#openTokens, documents: this.#openDocuments } }
  }

  async finish(): Promise<PartRecord> {
    if (this.#openDocuments > 0) await this.#finishShard()
    return this.#record()
  }

  #record(): PartRecord {
    return { tokens: this.#tokens, documents: this.#documents, textBytes: this.#textBytes, shards: [...this.#shards] }
  }

  async close(): Promise<void> {
    await Promise.all([this.#shard?.bin.close(), this.#shard?.lengths.close()])
    this.#shard = null
  }
}

async function reopened(path: string, bytes: number): Promise<FileHandle> {
  const handle = await open(path, bytes === 0 ? 'w' : 'r+')
  const { size } = await handle.stat()
  if (size < bytes) {
    await handle.close()
    throw new MoeError({
      code: 'E_DATA',
      op: 'tokenize',
      problem: `${path} has ${size} bytes, but ${bytes} were written`,
      fix: 'start again with overwrite: true (--overwrite)',
    })
  }
  await handle.truncate(bytes)
  return handle
}

async function writeIndex(path: string, sizes: Int32Array, idBytes: 2 | 4): Promise<string> {
  const hash = createHash('sha256')
  const handle = await open(path, 'w')
  try {
    let at = 0
    for (const part of encodeIndex(sizes, idBytes)) {
      hash.update(part)
      await writeAll(handle, part, at)
      at += part.byteLength
    }
    await flushFile(handle)
  } finally {
    await handle.close()
  }
  return hash.digest('hex')
}

async function writeAll(handle: FileHandle, data: NodeJS.ArrayBufferView, position: number): Promise<void> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
  for (let done = 0; done < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.length - done, position + done)
    done += bytesWritten
  }
}

async function hashOf(path: string): Promise<string> {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 22 })) hash.update(chunk as Buffer)
  return hash.digest('hex')
}
