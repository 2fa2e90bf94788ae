/** @file `tokens.json`: the metadata of tokens on disk. */
import { createHash } from 'node:crypto'
import { MoeError } from '@moe/core'

/** Name of the manifest in its folder. */
export const MANIFEST_FILE = 'tokens.json'

/** A pair of files, `NAME.bin` and `NAME.idx`. */
export interface ShardRecord {
  readonly name: string
  readonly tokens: number
  readonly documents: number
  /** SHA-256 of the two files. */
  readonly sha256: { readonly bin: string; readonly idx: string }
}

/** The shards of one stream. */
export interface PartRecord {
  readonly tokens: number
  readonly documents: number
  /** UTF-8 bytes of the texts. */
  readonly textBytes: number
  readonly shards: readonly ShardRecord[]
}

/** The content of `tokens.json`. */
export interface TokenManifest {
  readonly vocabSize: number
  /** Id before every document, or null for none. */
  readonly bos: number | null
  /** Id after every document, or null for none. */
  readonly eos: number | null
  /** Digest of the tokenizer; null if it has no tokenizer.json. */
  readonly tokenizer: string | null
  readonly training: PartRecord
  /** The held-out part; null if nothing is held out. */
  readonly validation: PartRecord | null
  /** The settings and input files, to detect that the same result exists already. */
  readonly record: Readonly<Record<string, string | number | null>>
}

const format = 'moe-tokens'
const version = 1

export const encodeManifest = (manifest: TokenManifest): string =>
  `${JSON.stringify({ format, version, ...manifest }, null, 2)}\n`

/** @throws MoeError E_DATA unless the text is a manifest of this version */
export function decodeManifest(path: string, text: string): TokenManifest {
  const wrong = (problem: string, cause?: unknown) =>
    new MoeError({ code: 'E_DATA', op: 'tokenFiles', problem: `${path}: ${problem}`, cause, details: { path } })
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (cause) {
    throw wrong(`not JSON (${(cause as Error).message})`, cause)
  }
  const fields = (typeof value === 'object' && value !== null ? value : {}) as Record<string, unknown>
  if (fields['format'] !== format) throw wrong(`format is ${JSON.stringify(fields['format'])}, expected ${format}`)
  if (fields['version'] !== version)
    throw wrong(`unsupported version ${JSON.stringify(fields['version'])}, expected ${version}`)
  const { vocabSize, bos, eos, tokenizer, training, validation, record } = fields
  const isId = (id: unknown) => id === null || (isCount(id) && id < (vocabSize as number))
  if (!isCount(vocabSize) || vocabSize < 1 || vocabSize > 2 ** 31)
    throw wrong(`vocabSize is ${JSON.stringify(vocabSize)}`)
  if (!isId(bos) || !isId(eos))
    throw wrong(`bos and eos are ${JSON.stringify([bos, eos])}, expected null or ids below ${vocabSize}`)
  if (tokenizer !== null && typeof tokenizer !== 'string') throw wrong(`tokenizer is ${JSON.stringify(tokenizer)}`)
  if (!isPart(training)) throw wrong('training is not a list of shards')
  if (validation !== null && !isPart(validation)) throw wrong('validation is not a list of shards')
  if (typeof record !== 'object' || record === null) throw wrong(`record is ${JSON.stringify(record)}`)
  return { vocabSize, bos, eos, tokenizer, training, validation, record } as TokenManifest
}

/** Digest of a stream: of the content of its shards, without their names. */
export function partDigest({ shards }: PartRecord): string {
  const hash = createHash('sha256')
  for (const { sha256 } of shards) hash.update(`${sha256.bin} ${sha256.idx}\n`)
  return hash.digest('hex').slice(0, 16)
}

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0

function isPart(value: unknown): boolean {
  const { tokens, documents, textBytes, shards } = (value ?? {}) as Partial<PartRecord>
  return [tokens, documents, textBytes].every(isCount) && Array.isArray(shards) && shards.every(isShard)
}

function isShard(value: unknown): boolean {
  const { name, tokens, documents, sha256 } = (value ?? {}) as Partial<ShardRecord>
  // A plain file name, so that nothing outside the folder is read.
  const named = typeof name === 'string' && /^[\w-][\w.-]*$/.test(name)
  const hashes = [sha256?.bin, sha256?.idx].every(hash => typeof hash === 'string')
  return named && hashes && isCount(tokens) && isCount(documents)
}
