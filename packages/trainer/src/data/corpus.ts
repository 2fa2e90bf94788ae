/** @file Texts to train on and texts held out, from files or from memory. */
import { constants, isUtf8 } from 'node:buffer'
import { readFileSync, realpathSync, statSync } from 'node:fs'
import { join, resolve, sep } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError, Random } from '@moe/core'
import { globSync } from 'tinyglobby'
import { checkDocuments } from './documents.ts'

/** Documents to train on, and documents that are only measured on. */
export interface Corpus {
  readonly training: readonly string[]
  readonly validation: readonly string[]
}

export interface TextOptions {
  /**
   * Held-out documents: a fraction in [0, 1) of the documents, drawn by `seed`, or the documents themselves. Of a
   * corpus of one document the last part is held out. Default 0.
   */
  readonly validation?: number | Iterable<string>
  /** Names the draw of held-out documents; the same seed and documents give the same draw. Default 0. */
  readonly seed?: number
}

export interface TextFilesOptions {
  /** As in `TextOptions`, or glob patterns of the files to hold out. */
  readonly validation?: number | { readonly files: string | readonly string[] }
  /**
   * Cuts each file into documents. Default: a file is a document. A document must fit into a string (512 Mi
   * characters); a file that does not can be cut by a string, not by an expression.
   */
  readonly separator?: string | RegExp
  readonly seed?: number
  /** Folder that patterns and paths are relative to. Default: the current one. */
  readonly cwd?: string | URL
}

/**
 * A corpus from UTF-8 files: paths, or glob patterns such as `corpus/**` + `/*.txt`, in alphabetical order. All text
 * is read at once. On Windows, patterns may have either slash.
 * @throws MoeError E_DATA when nothing matches, a file is not text, or all are empty
 */
export function textFiles(patterns: string | readonly string[], options: TextFilesOptions = {}): Corpus {
  checkOptions('textFiles', options, { validation: true, separator: true, seed: true, cwd: true })
  const { validation = 0, separator, seed, cwd: relativeTo = '.' } = options
  const cwd = resolve(pathOf('textFiles', relativeTo))
  const read = (paths: readonly string[]) => paths.flatMap(path => readDocuments(path, separator))
  const paths = findFiles(patterns, cwd)
  if (typeof validation === 'number') {
    return texts(read(paths), { validation, seed })
  }
  const heldOut = findFiles(validation?.files, cwd)
  // A file may have several paths: links, and where case makes no difference.
  const known = new Set(heldOut.map(path => realpathSync.native(path)))
  const without = paths.filter(path => !known.has(realpathSync.native(path)))
  return texts(read(without), { validation: read(heldOut), seed })
}

/**
 * A corpus from documents in memory. Empty ones are left out.
 * @throws MoeError E_DATA when there are none, or when one is not text
 */
export function texts(documents: Iterable<string>, options: TextOptions = {}): Corpus {
  checkOptions('texts', options, { validation: true, seed: true })
  const { validation = 0, seed = 0 } = options
  const all = checked(documents, 'the corpus')
  if (typeof validation !== 'number') return { training: all, validation: checked(validation, 'the held-out part') }
  if (!(validation >= 0 && validation < 1)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'texts',
      problem: `validation is ${validation}`,
      fix: 'pass a fraction of at least 0 and below 1, or the held-out documents themselves',
    })
  }
  if (validation === 0) return { training: all, validation: [] }
  if (all.length === 1) return cutTail(all[0], validation)
  const count = Math.min(all.length - 1, Math.max(1, Math.round(all.length * validation)))
  const order = new Random(seed).fork('validation').shuffle(Uint32Array.from(all, (_, i) => i))
  const heldOut = new Set(order.subarray(0, count))
  return { training: all.filter((_, i) => !heldOut.has(i)), validation: all.filter((_, i) => heldOut.has(i)) }
}

/** Cuts one document near the wanted place, at the end of a line if there is one. */
function cutTail(text: string, fraction: number): Corpus {
  const wanted = Math.min(text.length - 1, Math.max(1, Math.round(text.length * (1 - fraction))))
  const line = text.lastIndexOf('\n', wanted - 1) + 1
  let at = line > wanted / 2 ? line : wanted
  // Never between the halves of a surrogate pair.
  if (/[\uDC00-\uDFFF]/.test(text[at] ?? '')) at--
  if (at <= 0) throw tooSmall(text.length)
  return { training: [text.slice(0, at)], validation: [text.slice(at)] }
}

const tooSmall = (characters: number) =>
  new MoeError({
    code: 'E_DATA',
    op: 'texts',
    problem: `the corpus is one document of ${characters} characters, of which nothing can be held out`,
    fix: 'give more text, or validation: 0',
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
        problem: `document ${number} of ${what} holds NUL characters, so it is hardly text`,
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
      fix: 'pass at least one document with text in it',
    })
  }
  return kept
}

function findFiles(patterns: string | readonly string[] | undefined, cwd: string): string[] {
  const list = typeof patterns === 'string' ? [patterns] : patterns
  if (!Array.isArray(list) || list.some(pattern => typeof pattern !== 'string')) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'textFiles',
      problem: `${patterns} is no path or pattern, and no list of them`,
      fix: "pass texts such as 'corpus/**/*.txt'; { validation: { files } } takes the same",
    })
  }
  const found = new Set<string>()
  for (const pattern of list) {
    const kind = statSync(resolve(cwd, pattern), { throwIfNoEntry: false })
    if (kind?.isDirectory()) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'textFiles',
        problem: `${pattern} is a folder`,
        fix: `say which of its files: '${slashed(join(pattern, '**', '*.txt'))}'`,
      })
    }
    const matches =
      kind === undefined ? globSync(slashed(pattern), { cwd, absolute: true, dot: false }) : [resolve(cwd, pattern)]
    if (matches.length === 0) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'textFiles',
        problem: `no file matches ${pattern} in ${cwd}`,
        fix: 'check the pattern and the current folder, or pass { cwd }',
      })
    }
    for (const path of matches) found.add(slashed(path))
  }
  return [...found].sort()
}

/** As globs are written and found everywhere, so that the order is the same everywhere; elsewhere than on Windows `\` is no separator. */
const slashed = (path: string): string => (sep === '\\' ? path.replaceAll(sep, '/') : path)

function readDocuments(path: string, separator: string | RegExp | undefined): string[] {
  const bytes = readBytes(path)
  if (separator === undefined) return [decode(path, bytes)]
  // Cut before it is decoded, so that only its documents must fit into strings.
  const parts =
    typeof separator === 'string' && separator !== ''
      ? cut(bytes, Buffer.from(separator)).map(part => decode(path, part))
      : decode(path, bytes).split(separator)
  return parts.filter(part => part.trim().length > 0)
}

/** The bytes of a UTF-8 file, without the mark that some begin with. */
function readBytes(path: string): Buffer {
  let bytes: Buffer
  try {
    bytes = readFileSync(path)
  } catch (cause) {
    const tooLarge = (cause as NodeJS.ErrnoException).code === 'ERR_FS_FILE_TOO_LARGE'
    const fix = tooLarge ? 'cut it into smaller files' : undefined
    const problem = `${path} cannot be read: ${(cause as Error).message}`
    throw new MoeError({ code: 'E_DATA', op: 'textFiles', problem, fix, cause, details: { path } })
  }
  const nul = bytes.indexOf(0)
  if (nul >= 0 || !isUtf8(bytes)) {
    throw new MoeError({
      code: 'E_DATA',
      op: 'textFiles',
      problem: nul >= 0 ? `${path} is binary: byte ${nul} is NUL` : `${path} is not UTF-8 text`,
      fix: 'leave it out of the pattern, or convert it to UTF-8',
      details: { path },
    })
  }
  return bytes.subarray(bytes.subarray(0, 3).toString() === '\uFEFF' ? 3 : 0)
}

function cut(bytes: Buffer, separator: Buffer): Buffer[] {
  const parts: Buffer[] = []
  let from = 0
  for (let at = bytes.indexOf(separator); at >= 0; at = bytes.indexOf(separator, from)) {
    parts.push(bytes.subarray(from, at))
    from = at + separator.length
  }
  return [...parts, bytes.subarray(from)]
}

function decode(path: string, bytes: Buffer): string {
  try {
    return bytes.toString('utf8')
  } catch (cause) {
    const longest = `${constants.MAX_STRING_LENGTH} characters`
    throw new MoeError({
      code: 'E_DATA',
      op: 'textFiles',
      problem: `${path} has a document of ${bytes.length} bytes, and a string holds at most ${longest}`,
      fix: 'cut it into smaller files, or pass the text that separates its documents as { separator }',
      cause,
      details: { path },
    })
  }
}
