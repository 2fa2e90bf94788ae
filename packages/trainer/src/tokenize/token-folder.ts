/** @file The output folder of `tokenize`: its progress, and its manifest. */
import { existsSync, readFileSync } from 'node:fs'
import { open, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { flushFile, renameWithRetry } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { decodeManifest, encodeManifest, MANIFEST_FILE, type TokenManifest } from '../data/token-manifest.ts'
import type { Batch, Place } from './batches.ts'
import type { Encoded } from './encoding.ts'
import { nothingWritten, type PartState, PartWriter } from './part-writer.ts'

const PROGRESS_FILE = 'progress.json'
const format = 'moe-tokens-progress'

/** The settings and input files that determine the output. */
export type TokenizeRecord = Readonly<Record<string, string | number | null>>

interface Progress {
  readonly record: TokenizeRecord
  readonly next: Place
  /** Bytes of the input that are processed. */
  readonly bytes: number
  readonly training: PartState
  readonly validation: PartState
}

export interface FolderOptions {
  readonly record: TokenizeRecord
  readonly vocabSize: number
  readonly shardTokens: number
}

export class TokenFolder {
  readonly path: string
  readonly #record: TokenizeRecord
  readonly #training: PartWriter
  readonly #validation: PartWriter
  #next: Place
  #bytes: number
  /** False while a batch is being written, and after writing one failed. */
  #whole = true

  private constructor(path: string, { record, vocabSize, shardTokens }: FolderOptions, progress: Progress | undefined) {
    this.path = path
    this.#record = record
    const sizes = { vocabSize, shardTokens }
    this.#training = new PartWriter(path, 'training', sizes, progress?.training ?? nothingWritten)
    this.#validation = new PartWriter(path, 'validation', sizes, progress?.validation ?? nothingWritten)
    this.#next = progress?.next ?? { file: 0, at: 0 }
    this.#bytes = progress?.bytes ?? 0
  }

  /**
   * Opens a folder and continues from the progress of an earlier process. @throws MoeError E_CONFIG if its settings
   * differ
   */
  static async open(path: string, options: FolderOptions): Promise<TokenFolder> {
    const progress = readProgress(join(path, PROGRESS_FILE))
    if (progress !== undefined) checkSameRecord(path, progress.record, options.record)
    const folder = new TokenFolder(path, options, progress)
    await clearFolder(path, [...folder.#files, PROGRESS_FILE])
    return folder
  }

  /** Position of the next document. */
  get next(): Place {
    return this.#next
  }

  /** Bytes of the input that are processed. */
  get bytes(): number {
    return this.#bytes
  }

  get documents(): number {
    return this.#training.documents + this.#validation.documents
  }

  get tokens(): number {
    return this.#training.tokens + this.#validation.tokens
  }

  get #files(): string[] {
    return [...this.#training.files, ...this.#validation.files]
  }

  async write({ training, validation }: Encoded, { next, bytesRead }: Omit<Batch, 'texts'>): Promise<void> {
    this.#whole = false
    await this.#training.add(training.documents, training.textBytes)
    await this.#validation.add(validation.documents, validation.textBytes)
    this.#next = next
    this.#bytes = bytesRead
    this.#whole = true
  }

  /** Saves the progress for a later process, unless a batch could not be written completely. */
  async save(): Promise<void> {
    if (!this.#whole) return
    const progress: Progress = {
      record: this.#record,
      next: this.#next,
      bytes: this.#bytes,
      training: await this.#training.save(),
      validation: await this.#validation.save(),
    }
    await writeWhole(join(this.path, PROGRESS_FILE), JSON.stringify({ format, ...progress }))
  }

  /** Finishes the last shards and writes the manifest. */
  async finish(about: Omit<TokenManifest, 'training' | 'validation' | 'record'>): Promise<TokenManifest> {
    this.#whole = false
    const manifest: TokenManifest = {
      ...about,
      training: await this.#training.finish(),
      validation: this.#validation.documents > 0 ? await this.#validation.finish() : null,
      record: this.#record,
    }
    await writeWhole(join(this.path, MANIFEST_FILE), encodeManifest(manifest))
    await clearFolder(this.path, [...this.#files, MANIFEST_FILE])
    return manifest
  }

  async close(): Promise<void> {
    await Promise.all([this.#training.close(), this.#validation.close()])
  }
}

/**
 * The manifest of a finished folder; undefined if it is not finished. @throws MoeError E_CONFIG if its settings differ
 */
export function finishedIn(folder: string, record: TokenizeRecord): TokenManifest | undefined {
  const path = join(folder, MANIFEST_FILE)
  if (!existsSync(path)) return undefined
  const manifest = decodeManifest(path, readFileSync(path, 'utf8'))
  checkSameRecord(folder, manifest.record, record)
  return manifest
}

/** Removes our files from a folder, except those in `kept`. */
export async function clearFolder(folder: string, kept: readonly string[] = []): Promise<void> {
  const ours = /^(training|validation)-\d{5,}\.(bin|idx|lengths)$|^(tokens|progress)\.json(\.tmp)?$/
  for (const name of await readdir(folder))
    if (ours.test(name) && !kept.includes(name)) await rm(join(folder, name), { force: true })
}

function readProgress(path: string): Progress | undefined {
  if (!existsSync(path)) return undefined
  try {
    const value = JSON.parse(readFileSync(path, 'utf8')) as Progress & { readonly format: unknown }
    if (value.format !== format) throw new Error(`its format is ${JSON.stringify(value.format)}`)
    return value
  } catch (cause) {
    throw new MoeError({
      code: 'E_DATA',
      op: 'tokenize',
      problem: `cannot read ${path}: ${(cause as Error).message}`,
      fix: 'start again with overwrite: true (--overwrite)',
      cause,
    })
  }
}

/** Replaces a file atomically, even if the machine loses power. */
async function writeWhole(path: string, text: string): Promise<void> {
  const handle = await open(`${path}.tmp`, 'w')
  try {
    await handle.writeFile(text)
    await flushFile(handle)
  } finally {
    await handle.close()
  }
  await renameWithRetry(`${path}.tmp`, path)
}

function checkSameRecord(folder: string, stored: TokenizeRecord, own: TokenizeRecord): void {
  const keys = [...new Set([...Object.keys(stored), ...Object.keys(own)])]
  const differences = keys
    .filter(key => stored[key] !== own[key])
    .map(key => `${key}: was ${stored[key] ?? 'none'}, now ${own[key] ?? 'none'}`)
  if (differences.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'tokenize',
    problem: `${folder} contains tokens made with other settings:\n${differences.map(line => `  ${line}`).join('\n')}\n`,
    fix: 'choose another folder, or start again with overwrite: true (--overwrite)',
    details: { differences },
  })
}
