/** @file Training and held-out texts, from files or from memory. */
import { resolve } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError, Random } from '@moe/core'
import { checkDocuments } from './documents.ts'
import { findFiles, readDocuments, withoutHeldOut } from './files.ts'

/** Training and held-out documents. */
export interface Corpus {
  /** Texts to train on. */
  readonly training: readonly string[]
  /** Held-out texts; may be empty. */
  readonly validation: readonly string[]
}

/** Options of `texts`. */
export interface TextsOptions {
  /**
   * Held-out documents: a fraction in [0, 1), drawn by `seed`, or the documents themselves. If there is only one
   * document, its last part is held out. Default 0.
   */
  readonly validation?: number | Iterable<string> | undefined
  /** Seed of the draw of held-out documents. Default 0. */
  readonly seed?: number | undefined
}

/** Options of `textFiles`. */
export interface TextFilesOptions {
  /** As in `TextsOptions`, or glob patterns of the files to hold out. */
  readonly validation?: number | { readonly files: string | readonly string[] } | undefined
  /**
   * Splits each file into documents. Default: each file is a document. A document must fit into a string (512 Mi
   * characters); larger files can be split by a string, but not by a regular expression. A line feed in a string
   * matches the line ends of the file, CRLF or LF.
   */
  readonly separator?: string | RegExp | undefined
  /** As in `TextsOptions`. */
  readonly seed?: number | undefined
  /** Folder that patterns and paths are relative to. Default: the current one. */
  readonly cwd?: string | URL | undefined
}

/**
 * Reads a corpus from UTF-8 files, as `data` for `train`: paths, or glob patterns such as `corpus/**` + `/*.txt`, in
 * alphabetical order. All text is read at once. On Windows, patterns may contain either slash.
 *
 * @throws MoeError E_DATA if nothing matches, a file is not text, or all files are empty
 */
export function textFiles(patterns: string | readonly string[], options: TextFilesOptions = {}): Corpus {
  checkOptions('textFiles', options, { validation: true, separator: true, seed: true, cwd: true })
  const { validation = 0, separator, seed, cwd: relativeTo = '.' } = options
  const cwd = resolve(pathOf('textFiles', relativeTo))
  const read = (paths: readonly string[]) => paths.flatMap(path => readDocuments('textFiles', path, separator))
  const paths = findFiles('textFiles', patterns, cwd)
  if (typeof validation === 'number') {
    return texts(read(paths), { validation, seed })
  }
  const heldOut = findFiles('textFiles', validation?.files, cwd)
  return texts(read(withoutHeldOut(paths, heldOut)), { validation: read(heldOut), seed })
}

/**
 * Returns a corpus of documents in memory, as `data` for `train`. Empty documents are left out.
 *
 * @throws MoeError E_DATA if there are no documents, or one is not text
 */
export function texts(documents: Iterable<string>, options: TextsOptions = {}): Corpus {
  checkOptions('texts', options, { validation: true, seed: true })
  const { validation = 0, seed = 0 } = options
  const all = checked(documents, 'the corpus')
  if (typeof validation !== 'number') return { training: all, validation: checked(validation, 'the held-out part') }
  if (all.length === 1 && validation > 0 && validation < 1) return cutTail(all[0], validation)
  return holdOut('texts', all, validation, seed)
}

/**
 * Draws a fraction of several items to hold out: at least one, unless the fraction is 0.
 *
 * @throws MoeError E_CONFIG for an invalid fraction
 */
export function holdOut<T>(op: string, all: readonly T[], fraction: number, seed: number) {
  if (!(fraction >= 0 && fraction < 1)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op,
      problem: `validation is ${fraction}`,
      fix: 'pass a fraction of at least 0 and below 1, or the held-out items themselves',
    })
  }
  if (fraction === 0) return { training: all, validation: [] }
  const count = Math.min(all.length - 1, Math.max(1, Math.round(all.length * fraction)))
  const order = new Random(seed).fork('validation').shuffle(Uint32Array.from(all, (_, i) => i))
  const heldOut = new Set(order.subarray(0, count))
  return { training: all.filter((_, i) => !heldOut.has(i)), validation: all.filter((_, i) => heldOut.has(i)) }
}

/** Splits one document near the given fraction, at the end of a line if possible. */
function cutTail(text: string, fraction: number): Corpus {
  const wanted = Math.min(text.length - 1, Math.max(1, Math.round(text.length * (1 - fraction))))
  const line = text.lastIndexOf('\n', wanted - 1) + 1
  let at = line > wanted / 2 ? line : wanted
  // Never splits a surrogate pair.
  if (/[\uDC00-\uDFFF]/.test(text[at] ?? '')) at--
  if (at <= 0) throw tooSmall(text.length)
  return { training: [text.slice(0, at)], validation: [text.slice(at)] }
}

const tooSmall = (characters: number) =>
  new MoeError({
    code: 'E_DATA',
    op: 'texts',
    problem: `the corpus is one document of ${characters} characters, too short to hold out a part`,
    fix: 'add more text, or pass validation: 0',
  })

function checked(documents: Iterable<string>, what: string): string[] {
  checkDocuments('texts', documents)
  const kept: string[] = []
  let number = 0
  for (const text of documents) {
    if (typeof text !== 'string') {
      throw new MoeError({
        code: 'E_DATA',
        op: 'texts',
        problem: `document ${number} of ${what} is ${text === null ? 'null' : `of type ${typeof text}`}`,
        fix: 'pass strings; decode bytes first',
      })
    }
    if (text.includes('\0')) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'texts',
        problem: `document ${number} of ${what} contains NUL characters, so it is probably not text`,
        fix: 'leave out binary content',
        details: { document: number },
      })
    }
    if (text.length > 0) kept.push(text)
    number++
  }
  if (kept.length === 0) {
    throw new MoeError({
      code: 'E_DATA',
      op: 'texts',
      problem: number === 0 ? `${what} has no documents` : `all ${number} documents of ${what} are empty`,
      fix: 'pass at least one document that is not empty',
    })
  }
  return kept
}
