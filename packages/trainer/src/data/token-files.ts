/** @file Tokens on disk, read on demand, so that memory does not grow with the corpus. */
import { createHash } from 'node:crypto'
import { closeSync, existsSync, openSync, readFileSync, readSync, statSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError, shown } from '@moe/core'
import { IndexedFile } from './indexed-file.ts'
import { decodeManifest, MANIFEST_FILE, type PartRecord, partDigest, type TokenManifest } from './token-manifest.ts'
import { lastUpTo, type TokenStream } from './token-stream.ts'

/** Options of `tokenFiles`, for files without a manifest. */
export interface TokenFilesOptions {
  /** Number of ids. Required for files of Megatron-LM. */
  readonly vocabSize?: number | undefined
  /** Held-out files of Megatron-LM. */
  readonly validation?: string | readonly string[] | undefined
  /** Folder that paths are relative to. Default: the current one. */
  readonly cwd?: string | URL | undefined
}

interface StreamParts {
  readonly vocabSize: number
  readonly textBytes: number
  readonly padding: number
  readonly end: number | null | undefined
  /** Whether documents have no begin token. */
  readonly bare: boolean
  readonly tokenizer: string | undefined
  readonly digest: string
}

/** A stream of tokens on disk. Created by `tokenFiles`. */
export class TokenFiles implements TokenStream {
  readonly length: number
  readonly documents: number
  readonly examples = null
  readonly textBytes: number
  readonly vocabSize: number
  readonly padding: number
  /** @internal */
  readonly end: number | null | undefined
  /** @internal */
  readonly tokenizer: string | undefined
  readonly digest: string
  readonly unpredictable: number
  readonly #files: readonly IndexedFile[]
  /** Number of tokens and of documents before each file. */
  readonly #tokensBefore: Float64Array
  readonly #documentsBefore: Float64Array

  /** @internal */
  constructor(files: readonly IndexedFile[], parts: StreamParts) {
    // Positions are looked up by the tokens before each file, so empty files are left out.
    this.#files = files.filter(({ length }) => length > 0)
    this.#tokensBefore = new Float64Array(this.#files.length)
    this.#documentsBefore = new Float64Array(this.#files.length)
    let length = 0
    let documents = 0
    this.#files.forEach((file, i) => {
      this.#tokensBefore[i] = length
      this.#documentsBefore[i] = documents
      length += file.length
      documents += file.starts.length
    })
    this.length = length
    this.documents = documents
    this.textBytes = parts.textBytes
    this.vocabSize = parts.vocabSize
    this.padding = parts.padding
    this.end = parts.end
    this.tokenizer = parts.tokenizer
    this.digest = parts.digest
    this.unpredictable = parts.bare ? documents : 0
  }

  get predictable(): number {
    return this.length - this.documents
  }

  documentAt(position: number): number {
    const file = lastUpTo(this.#tokensBefore, position)
    return this.#documentsBefore[file] + lastUpTo(this.#files[file].starts, position - this.#tokensBefore[file])
  }

  startOf(document: number): number {
    if (document >= this.documents) return Number.POSITIVE_INFINITY
    const file = lastUpTo(this.#documentsBefore, document)
    return this.#tokensBefore[file] + this.#files[file].starts[document - this.#documentsBefore[file]]
  }

  /** @throws MoeError E_DATA for ids outside the vocabulary, and for files that can no longer be read */
  read(from: number, count: number): Int32Array {
    const tokens = new Int32Array(count)
    let file = lastUpTo(this.#tokensBefore, from)
    for (let done = 0; done < count; file++) {
      const within = from + done - this.#tokensBefore[file]
      const here = Math.min(count - done, this.#files[file].length - within)
      this.#files[file].read(tokens, done, within, here, this.vocabSize)
      done += here
    }
    return tokens
  }

  /** Closes the files. They are opened again when needed. */
  close(): void {
    for (const file of this.#files) file.close()
  }
}

/**
 * Opens tokens on disk, as `data` for `train`: a folder that `moe-trainer tokenize` wrote, or files of Megatron-LM
 * (`NAME.bin` and `NAME.idx`) by their paths with or without these extensions, joined in the given order. Only the
 * starts of documents are kept in memory, 4 bytes each. Tokens are read and checked on demand.
 *
 * @throws MoeError E_DATA for missing, corrupt or unfinished files
 */
export function tokenFiles(
  paths: string | URL | readonly string[],
  options: TokenFilesOptions = {},
): { readonly training: TokenFiles; readonly validation?: TokenFiles } {
  checkOptions('tokenFiles', options, { vocabSize: true, validation: true, cwd: true })
  const { vocabSize, validation, cwd = '.' } = options
  const base = resolve(pathOf('tokenFiles', cwd))
  const list = (Array.isArray(paths) ? paths : [paths]).map(path => resolve(base, pathOf('tokenFiles', path)))
  const [folder] = list
  if (list.length === 1 && statSync(folder, { throwIfNoEntry: false })?.isDirectory()) return ofFolder(folder)
  if (list.length === 1 && !existsSync(folder) && !existsSync(`${folder}.bin`) && vocabSize === undefined)
    throw refusal(
      `there is no folder ${folder}`,
      'write it with moe-trainer tokenize, or pass paths of files and vocabSize',
    )
  if (list.length === 0) throw refusal('there are no paths', 'pass a folder, or paths of files')
  if (!Number.isSafeInteger(vocabSize) || (vocabSize as number) < 1) {
    const fix = `pass { vocabSize } of the tokenizer that was used, or the folder that moe-trainer tokenize wrote`
    throw refusal(`vocabSize is ${shown(vocabSize)}, and ${folder} does not record it`, fix)
  }
  const heldOut = typeof validation === 'string' ? [validation] : validation
  return {
    training: ofMegatron(list, vocabSize as number),
    ...(heldOut && {
      validation: ofMegatron(
        heldOut.map(path => resolve(base, path)),
        vocabSize as number,
      ),
    }),
  }
}

function ofFolder(folder: string): { readonly training: TokenFiles; readonly validation?: TokenFiles } {
  const path = join(folder, MANIFEST_FILE)
  let text: string
  try {
    text = readFileSync(path, 'utf8')
  } catch (cause) {
    const absent = (cause as NodeJS.ErrnoException).code === 'ENOENT'
    throw refusal(
      absent ? `${folder} has no ${MANIFEST_FILE}` : `cannot read ${path}: ${(cause as Error).message}`,
      absent
        ? 'finish moe-trainer tokenize, which writes it last; for files of Megatron-LM, pass their paths'
        : undefined,
      cause,
    )
  }
  const manifest = decodeManifest(path, text)
  const { training, validation } = manifest
  const of = (part: PartRecord) => ofShards(folder, manifest, part)
  return { training: of(training), ...(validation && { validation: of(validation) }) }
}

function ofShards(folder: string, { bos, eos, vocabSize, tokenizer }: TokenManifest, part: PartRecord): TokenFiles {
  const files = part.shards.map(({ name, tokens, documents }) => {
    const file = new IndexedFile(join(folder, name))
    if (file.length === tokens && file.starts.length === documents) return file
    throw refusal(
      `${file.path} has ${file.length} tokens in ${file.starts.length} documents, but ${MANIFEST_FILE} records ${tokens} in ${documents}`,
      'use files from a single run of moe-trainer tokenize',
    )
  })
  return atLeastTwo(
    new TokenFiles(files, {
      vocabSize,
      textBytes: part.textBytes,
      padding: eos ?? bos ?? 0,
      end: eos,
      bare: bos === null,
      tokenizer: tokenizer ?? undefined,
      digest: partDigest(part),
    }),
    folder,
  )
}

function ofMegatron(paths: readonly string[], vocabSize: number): TokenFiles {
  const files = paths.map(path => new IndexedFile(path.replace(/\.(bin|idx)$/, '')))
  const hash = createHash('sha256')
  for (const { path } of files) for (const part of samples(path)) hash.update(part)
  const digest = hash.digest('hex').slice(0, 16)
  const unknown = { textBytes: 0, padding: 0, end: undefined, bare: false, tokenizer: undefined }
  return atLeastTwo(new TokenFiles(files, { vocabSize, digest, ...unknown }), paths[0])
}

/** Identifies files without reading them completely: the index, and both ends of the tokens. */
function* samples(path: string): Generator<Uint8Array> {
  const most = 1 << 20
  for (const [name, ends] of [
    [`${path}.idx`, false],
    [`${path}.bin`, true],
  ] as const) {
    const file = openSync(name, 'r')
    try {
      const { size } = statSync(name)
      const part = new Uint8Array(most)
      for (let at = 0; at < size; at = ends && at === 0 ? Math.max(most, size - most) : at + most)
        yield part.subarray(0, readSync(file, part, 0, most, at))
    } finally {
      closeSync(file)
    }
  }
}

function atLeastTwo(stream: TokenFiles, path: string): TokenFiles {
  if (stream.length >= 2) return stream
  throw refusal(`${path} has ${stream.length} tokens, expected at least 2`, 'tokenize more text')
}

const refusal = (problem: string, fix?: string, cause?: unknown) =>
  new MoeError({ code: 'E_DATA', op: 'tokenFiles', problem, fix, cause })
