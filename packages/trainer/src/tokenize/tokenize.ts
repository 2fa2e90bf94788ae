/** @file `tokenize`: encodes text files into tokens on disk. */
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

/** Options of `tokenize`. */
export interface TokenizeOptions extends DocumentTokens {
  /** Encodes texts; on several threads if it has `encodeBatch`. */
  readonly tokenizer: TextTokenizer
  /** Output folder, for `training-00000.bin` and `.idx` and so on, and `tokens.json`. */
  readonly out: string | URL
  /**
   * Separator of the documents in a text file. Default: each file is a document. A line feed matches the line ends of
   * the file, CRLF or LF.
   */
  readonly separator?: string | undefined
  /** Field of `.jsonl` lines, or column of `.parquet` files, that contains the text. Default `text`. */
  readonly field?: string | undefined
  /**
   * Fraction of documents to hold out, selected by `seed` and the document's text, so that copies of a document stay
   * together. Default 0.
   */
  readonly validation?: number | undefined
  /**
   * Fraction of training documents to rearrange for fill-in-the-middle: prefix, suffix, middle (DeepSeek-V3 uses 0.1;
   * report, 4.1). Default 0.
   */
  readonly fimRate?: number | undefined
  /** Special tokens around the three parts. Default: those of DeepSeek-V3's tokenizer. */
  readonly fimTokens?: FimTokens | undefined
  /** Seed of held-out selection and fill-in-the-middle. Default 0. */
  readonly seed?: number | undefined
  /**
   * Maximum number of tokens per pair of files, unless a single document has more. Default 2^29 (1 GiB with 16 bits
   * each).
   */
  readonly shardTokens?: number | undefined
  /** Number of threads. Default: one per core. */
  readonly threads?: number | undefined
  /** Removes the output of an earlier call with other settings. Default false. */
  readonly overwrite?: boolean | undefined
  /** Folder that patterns are relative to. Default: the current one. */
  readonly cwd?: string | URL | undefined
  /**
   * Stops tokenizing. The promise then rejects with the signal's reason. The next call with the same settings
   * continues.
   */
  readonly signal?: AbortSignal | undefined
  /** Called with the progress after every few megabytes. */
  readonly onProgress?: ((progress: TokenizeProgress) => void) | undefined
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

/** Progress of `tokenize`. */
export interface TokenizeProgress {
  /** Bytes of the (compressed) files read so far, including those of an earlier call. */
  readonly bytes: number
  /** How many of these an earlier call read. */
  readonly fromBytes: number
  /** Total bytes of all files. */
  readonly totalBytes: number
  /** Documents written. */
  readonly documents: number
  /** Tokens written. */
  readonly tokens: number
  /** Seconds of this call. */
  readonly seconds: number
}

/** Result of `tokenize`. */
export interface TokenizeResult {
  /** The output folder, for `tokenFiles`. */
  readonly folder: string
  /** Training tokens, including those that begin and end documents. */
  readonly trainingTokens: number
  /** Training documents. */
  readonly trainingDocuments: number
  /** Held-out tokens. */
  readonly validationTokens: number
  /** Held-out documents. */
  readonly validationDocuments: number
  /** UTF-8 bytes of all texts. */
  readonly textBytes: number
  /** Size of the vocabulary. */
  readonly vocabSize: number
  /** Seconds of this call; almost none if an earlier call finished the work. */
  readonly seconds: number
}

/** Approximate number of characters per thread and batch. Threads wait for each other at the end of a batch. */
const THREAD_CHARACTERS = 1 << 22
const SAVE_SECONDS = 5
/** Batches to read ahead while others are tokenized. */
const AHEAD = 2

/**
 * Tokenizes text files to disk, in the format that `tokenFiles` and Megatron-LM read: `.txt`, `.jsonl` (both also `.gz`
 * and `.zst`) and `.parquet`, in alphabetical order. Memory use does not grow with the files. The output is the same to
 * the byte for any number of threads, and also if a call was killed and another one continued.
 *
 * @throws MoeError E_CONFIG for invalid settings, or settings that differ from those of the output folder
 * @throws MoeError E_DATA for files that cannot be read
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
    files: filesRecord(sources),
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
      const folder = await TokenFolder.open(path, { record, vocabSize, shardTokens })
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

/** Tokenizes the rest of the sources. */
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
      // A rejection is thrown where the promise is awaited.
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

/** @throws MoeError E_CONFIG that lists all invalid settings */
function checkedSettings(options: TokenizeOptions) {
  const { tokenizer, separator, threads = availableParallelism(), shardTokens = 2 ** 29 } = options
  const { validation = 0, fimRate = 0, seed = 0 } = options
  if (typeof tokenizer?.encode !== 'function') throw noTokenizer(tokenizer)
  const vocabSize = tokenizer.vocabSize as number
  const problems: string[] = []
  const integers = { vocabSize: [vocabSize, 1], threads: [threads, 1], shardTokens: [shardTokens, 1], seed: [seed, 0] }
  for (const [name, [value, least]] of Object.entries(integers))
    if (!(Number.isSafeInteger(value) && value >= least && value < 2 ** 31))
      problems.push(`${name} is ${shown(value)}, expected an integer of at least ${least}`)
  for (const [name, value] of Object.entries({ validation, fimRate }))
    if (!(value >= 0 && (name === 'fimRate' ? value <= 1 : value < 1)))
      problems.push(`${name} is ${shown(value)}, expected a fraction of the documents`)
  if (separator !== undefined && (typeof separator !== 'string' || separator === ''))
    problems.push(`separator is ${shown(separator)}, expected a string`)
  if (problems.length === 0) return { vocabSize, threads, shardTokens, validation, fimRate, seed }
  throw new MoeError({ code: 'E_CONFIG', op: 'tokenize', problem: problems.join(', '), fix: 'change these options' })
}

/** Identifies the input by file names and sizes, without folders, because files may be moved. */
function filesRecord({ paths, sizes, bytes }: Sources): string {
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
    problem: `no text in ${paths.length} files`,
    fix: 'check the patterns, and the field that contains the text',
  })
