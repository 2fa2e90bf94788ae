/** @file `tokenize`: files of text become tokens on disk. */
import { createHash } from 'node:crypto'
import { availableParallelism } from 'node:os'
import { basename, resolve } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError, type OptionNames, shown } from '@moe/core'
import { lockFolder } from '../checkpoints/folder-lock.ts'
import { findFiles } from '../data/files.ts'
import { type DocumentTokens, documentTokens, noTokenizer } from '../data/token-dataset.ts'
import type { TokenManifest } from '../data/token-manifest.ts'
import { tokenizerDigest } from '../data/tokenizer-digest.ts'
import type { TextTokenizer } from '../model.ts'
import { type Batch, Sources } from './batches.ts'
import { type Encoded, type FimTokens, TextEncoding } from './encoding.ts'
import { clearFolder, finishedIn, TokenFolder, type TokenizeRecord } from './token-folder.ts'

/** What is made of which files. */
export interface TokenizeOptions extends DocumentTokens {
  /** Makes tokens of texts; on several threads where it has `encodeBatch`. */
  readonly tokenizer: TextTokenizer
  /** Folder for `training-00000.bin` and `.idx` and so on, and `tokens.json`. */
  readonly out: string | URL
  /** Text that separates the documents of a `.txt`. Default: a file is a document. A line feed stands for the line ends of the file, CRLF or LF. */
  readonly separator?: string
  /** Field of a line of `.jsonl`, or column of a `.parquet`, that holds the text. Default `text`. */
  readonly field?: string
  /** Fraction of the documents that are held out, drawn by `seed` and by their text: copies of a document stay together. Default 0. */
  readonly validation?: number
  /** Fraction of the documents to train on that are written as prefix, suffix, middle (DeepSeek-V3 report, 4.1, has 0.1). Default 0. */
  readonly fimRate?: number
  /** What is put around the three parts. Default: the tokens of DeepSeek-V3's tokenizer. */
  readonly fimTokens?: FimTokens
  /** Names what is drawn. Default 0. */
  readonly seed?: number
  /** Most tokens of a pair of files, unless one document has more. Default 2^29, a gibibyte of 16 bits each. */
  readonly shardTokens?: number
  /** Threads that tokenize. Default: one a core. */
  readonly threads?: number
  /** Remove what an earlier call with other settings has written into the folder. Default false. */
  readonly overwrite?: boolean
  /** Folder that patterns are relative to. Default: the current one. */
  readonly cwd?: string | URL
  /** Ends it; the promise then rejects with the signal's reason. The next call with the same settings goes on. */
  readonly signal?: AbortSignal
  /** Is told how far it is, after every few megabytes. */
  readonly onProgress?: (progress: TokenizeProgress) => void
}

const names: OptionNames<TokenizeOptions> = {
  tokenizer: true,
  out: true,
  separator: true,
  field: true,
  validation: true,
  fimRate: true,
  fimTokens: true,
  seed: true,
  shardTokens: true,
  threads: true,
  overwrite: true,
  cwd: true,
  signal: true,
  onProgress: true,
  bos: true,
  eos: true,
}

/** How far it is. */
export interface TokenizeProgress {
  /** Bytes of the files read so far, as they lie on the disk, and those of an earlier call. */
  readonly bytes: number
  /** Of these, what an earlier call did. */
  readonly fromBytes: number
  /** Bytes of all files. */
  readonly totalBytes: number
  /** Documents written. */
  readonly documents: number
  /** Tokens written. */
  readonly tokens: number
  /** Of this call. */
  readonly seconds: number
}

/** What was written. */
export interface TokenizeResult {
  /** The folder, for `tokenFiles`. */
  readonly folder: string
  /** Tokens to train on, those that begin and end documents included. */
  readonly trainingTokens: number
  /** Documents to train on. */
  readonly trainingDocuments: number
  /** Tokens held out. */
  readonly validationTokens: number
  /** Documents held out. */
  readonly validationDocuments: number
  /** UTF-8 bytes of all texts. */
  readonly textBytes: number
  /** Ids of the vocabulary. */
  readonly vocabSize: number
  /** Of this call; next to nothing where an earlier one had written all. */
  readonly seconds: number
}

/** Characters that a thread gets at a time, about: the last of a batch wait for each other. */
const THREAD_CHARACTERS = 1 << 22
const SAVE_SECONDS = 5
/** Batches that are read while others are tokenized. */
const AHEAD = 2

/**
 * Tokens of text files, as `tokenFiles` and Megatron-LM read them: `.txt`, `.jsonl` (both also `.gz` and `.zst`) and `.parquet`, in alphabetical order. Memory does not grow
 * with the files, and the result does not depend on threads: to the byte it is the same, also where a call was killed and another went on.
 * @throws MoeError E_CONFIG for settings that cannot be, or others than those of what is in the folder; E_DATA for files that cannot be read
 */
export async function tokenize(
  patterns: string | readonly string[],
  options: TokenizeOptions,
): Promise<TokenizeResult> {
  checkOptions('tokenize', options, names)
  const started = performance.now()
  const { tokenizer, out, cwd = '.', separator, field = 'text', overwrite = false } = options
  const { vocabSize, shardTokens, threads, ...draws } = checkedSettings(options)
  const { bos, eos } = documentTokens(tokenizer, options)
  const encoding = new TextEncoding(tokenizer, { ...draws, bos, eos, threads, fimTokens: options.fimTokens })
  const paths = findFiles('tokenize', patterns, resolve(pathOf('tokenize', cwd)))
  const sources = new Sources(paths, { separator, field })
  const about = { vocabSize, bos, eos, tokenizer: tokenizerDigest(tokenizer) ?? null }
  const { fimRate, validation, seed } = draws
  const record: TokenizeRecord = {
    files: told(sources),
    ...about,
    separator: separator ?? null,
    field,
    validation,
    fimRate,
    ...(fimRate > 0 && { fimTokens: Object.values(options.fimTokens ?? {}).join(' ') }),
    ...(fimRate + validation > 0 && { seed }),
    shardTokens,
  }
  const path = resolve(pathOf('tokenize', out))
  const unlock = lockFolder(path, 'tokenize')
  try {
    if (overwrite) await clearFolder(path)
    let manifest = finishedIn(path, record)
    if (manifest === undefined) {
      const folder = await TokenFolder.goOn(path, { record, vocabSize, shardTokens })
      try {
        await writeAll(folder, sources, encoding, { ...options, threads })
        if (folder.tokens === 0) throw nothingIn(paths)
        manifest = await folder.finish(about)
      } finally {
        await folder.close()
      }
    }
    return resultOf(path, manifest, (performance.now() - started) / 1000)
  } finally {
    unlock()
  }
}

/** From where the folder is to the end of the sources. */
async function writeAll(
  folder: TokenFolder,
  sources: Sources,
  encoding: TextEncoding,
  { threads, signal, onProgress }: Pick<TokenizeOptions, 'signal' | 'onProgress'> & { readonly threads: number },
): Promise<void> {
  const started = performance.now()
  let savedAt = started
  const fromBytes = folder.bytes
  const encoded: { readonly batch: Batch; readonly parts: Promise<Encoded> }[] = []
  const writeNext = async () => {
    const { batch, parts } = encoded.shift() as (typeof encoded)[number]
    await folder.write(await parts, batch)
    const now = performance.now()
    const { bytes, documents, tokens } = folder
    onProgress?.({ bytes, fromBytes, totalBytes: sources.bytes, documents, tokens, seconds: (now - started) / 1000 })
    if (now - savedAt < SAVE_SECONDS * 1000) return
    await folder.save()
    savedAt = performance.now()
  }
  try {
    for await (const batch of sources.batches(folder.next, threads * THREAD_CHARACTERS)) {
      signal?.throwIfAborted()
      const parts = encoding.encode(batch.texts)
      // What it fails with is thrown where it is awaited.
      parts.catch(() => undefined)
      encoded.push({ batch, parts })
      if (encoded.length > AHEAD) await writeNext()
    }
    while (encoded.length > 0) {
      signal?.throwIfAborted()
      await writeNext()
    }
  } finally {
    await folder.save()
  }
}

/** @throws MoeError E_CONFIG that lists every setting that cannot be */
function checkedSettings(options: TokenizeOptions) {
  const { tokenizer, separator, threads = availableParallelism(), shardTokens = 2 ** 29 } = options
  const { validation = 0, fimRate = 0, seed = 0 } = options
  if (typeof tokenizer?.encode !== 'function') throw noTokenizer(tokenizer)
  const vocabSize = tokenizer.vocabSize as number
  const problems: string[] = []
  const whole = { vocabSize: [vocabSize, 1], threads: [threads, 1], shardTokens: [shardTokens, 1], seed: [seed, 0] }
  for (const [name, [value, least]] of Object.entries(whole))
    if (!(Number.isSafeInteger(value) && value >= least && value < 2 ** 31))
      problems.push(`${name} is ${shown(value)}, needs a whole number from ${least}`)
  for (const [name, value] of Object.entries({ validation, fimRate }))
    if (!(value >= 0 && (name === 'fimRate' ? value <= 1 : value < 1)))
      problems.push(`${name} is ${shown(value)}, needs a fraction of the documents`)
  if (separator !== undefined && (typeof separator !== 'string' || separator === ''))
    problems.push(`separator is ${shown(separator)}, needs a text`)
  if (problems.length === 0) return { vocabSize, threads, shardTokens, validation, fimRate, seed }
  throw new MoeError({ code: 'E_CONFIG', op: 'tokenize', problem: problems.join(', '), fix: 'change these options' })
}

/** Names without their folders: these may be moved. */
function told({ paths, sizes, bytes }: Sources): string {
  const list = JSON.stringify(paths.map((path, i) => [basename(path), sizes[i]]))
  return `${paths.length} of ${bytes} bytes (${createHash('sha256').update(list).digest('hex').slice(0, 16)})`
}

function resultOf(folder: string, { vocabSize, training, validation }: TokenManifest, seconds: number): TokenizeResult {
  return {
    folder,
    trainingTokens: training.tokens,
    trainingDocuments: training.documents,
    validationTokens: validation?.tokens ?? 0,
    validationDocuments: validation?.documents ?? 0,
    textBytes: training.textBytes + (validation?.textBytes ?? 0),
    vocabSize,
    seconds,
  }
}

const nothingIn = (paths: readonly string[]) =>
  new MoeError({
    code: 'E_DATA',
    op: 'tokenize',
    problem: `${paths.length} files have no text in them`,
    fix: 'check the patterns, and the field that holds the text',
  })
