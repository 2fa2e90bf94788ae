/** @file Finds and reads text files. */
import { constants, isUtf8 } from 'node:buffer'
import { readFileSync, realpathSync, statSync } from 'node:fs'
import { join, resolve, sep } from 'node:path'
import { MoeError } from '@moe/core'
import { globSync } from 'tinyglobby'

/** Paths without the held-out ones, compared by real path: a file may have several paths, by links or letter case. */
export function withoutHeldOut(paths: readonly string[], heldOut: readonly string[]): string[] {
  const known = new Set(heldOut.map(path => realpathSync.native(path)))
  return paths.filter(path => !known.has(realpathSync.native(path)))
}

/**
 * Finds files by path or pattern, in alphabetical order.
 *
 * @throws MoeError E_ATTR, E_DATA
 * @internal
 */
export function findFiles(op: string, patterns: string | readonly string[] | undefined, cwd: string): string[] {
  const list = typeof patterns === 'string' ? [patterns] : patterns
  if (!Array.isArray(list) || list.some(pattern => typeof pattern !== 'string')) {
    throw new MoeError({
      code: 'E_ATTR',
      op,
      problem: `${patterns} is not a path or pattern, nor a list of them`,
      fix: "pass strings such as 'corpus/**/*.txt', also in { validation: { files } }",
    })
  }
  const found = new Set<string>()
  for (const pattern of list) {
    const kind = statSync(resolve(cwd, pattern), { throwIfNoEntry: false })
    if (kind?.isDirectory()) {
      throw new MoeError({
        code: 'E_DATA',
        op,
        problem: `${pattern} is a folder`,
        fix: `pass a pattern of its files: '${slashed(join(pattern, '**', '*.txt'))}'`,
      })
    }
    const matches =
      kind === undefined ? globSync(slashed(pattern), { cwd, absolute: true, dot: false }) : [resolve(cwd, pattern)]
    if (matches.length === 0) {
      throw new MoeError({
        code: 'E_DATA',
        op,
        problem: `no file matches ${pattern} in ${cwd}`,
        fix: 'check the pattern, which starts from that folder',
      })
    }
    for (const path of matches) found.add(slashed(path))
  }
  return [...found].sort()
}

/**
 * With forward slashes, so that globs and the sort order are the same on all systems. Only on Windows is `\` a
 * separator.
 */
const slashed = (path: string): string => (sep === '\\' ? path.replaceAll(sep, '/') : path)

/**
 * Returns the documents of a UTF-8 file, without those that are only white space.
 *
 * @throws MoeError E_DATA
 */
export function readDocuments(op: string, path: string, separator: string | RegExp | undefined): string[] {
  const bytes = readBytes(op, path)
  if (separator === undefined) return [decode(op, path, bytes)]
  // Split before decoding, so that only each document must fit into a string.
  const parts =
    typeof separator === 'string' && separator !== ''
      ? cut(bytes, asIn(bytes, separator)).map(part => decode(op, path, part))
      : decode(op, path, bytes).split(separator)
  return parts.filter(part => part.trim().length > 0)
}

/** The bytes of a UTF-8 file, without a byte order mark. */
function readBytes(op: string, path: string): Buffer {
  let bytes: Buffer
  try {
    bytes = readFileSync(path)
  } catch (cause) {
    const tooLarge = (cause as NodeJS.ErrnoException).code === 'ERR_FS_FILE_TOO_LARGE'
    const fix = tooLarge ? 'split it into smaller files' : undefined
    const problem = `cannot read ${path}: ${(cause as Error).message}`
    throw new MoeError({ code: 'E_DATA', op, problem, fix, cause, details: { path } })
  }
  const nul = bytes.indexOf(0)
  if (nul >= 0 || !isUtf8(bytes)) {
    throw new MoeError({
      code: 'E_DATA',
      op,
      problem: nul >= 0 ? `${path} is binary: byte ${nul} is NUL` : `${path} is not UTF-8 text`,
      fix: 'leave it out of the pattern, or convert it to UTF-8',
      details: { path },
    })
  }
  return bytes.subarray(bytes.subarray(0, 3).toString() === '\uFEFF' ? 3 : 0)
}

/**
 * Returns the lines of a UTF-8 file, including blank ones.
 *
 * @throws MoeError E_DATA
 */
export function readLines(op: string, path: string): string[] {
  return cut(readBytes(op, path), Buffer.from('\n')).map(line => decode(op, path, line))
}

/** A separator with the line ends of the file, CRLF or LF, judged by the file's first line. */
function asIn(bytes: Buffer, separator: string): Buffer {
  const crlf = bytes[bytes.indexOf('\n') - 1] === 13
  return Buffer.from(crlf ? separator.replaceAll(/\r?\n/g, '\r\n') : separator)
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

function decode(op: string, path: string, bytes: Buffer): string {
  try {
    return bytes.toString('utf8')
  } catch (cause) {
    const longest = `${constants.MAX_STRING_LENGTH} characters`
    throw new MoeError({
      code: 'E_DATA',
      op,
      problem: `${path} contains a document of ${bytes.length} bytes, but a string is limited to ${longest}`,
      fix: 'split it into smaller files, or pass the string that separates its documents as { separator }',
      cause,
      details: { path },
    })
  }
}
