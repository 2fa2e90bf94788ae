/** @file Text files by their names, whole or in parts. */
import { constants, isUtf8 } from 'node:buffer'
import { readFileSync, realpathSync, statSync } from 'node:fs'
import { join, resolve, sep } from 'node:path'
import { MoeError } from '@moe/core'
import { globSync } from 'tinyglobby'

/** A file may have several paths: links, and where case makes no difference. */
export function withoutHeldOut(paths: readonly string[], heldOut: readonly string[]): string[] {
  const known = new Set(heldOut.map(path => realpathSync.native(path)))
  return paths.filter(path => !known.has(realpathSync.native(path)))
}

/**
 * Files by path or pattern, in alphabetical order.
 * @throws MoeError E_ATTR, E_DATA
 */
export function findFiles(op: string, patterns: string | readonly string[] | undefined, cwd: string): string[] {
  const list = typeof patterns === 'string' ? [patterns] : patterns
  if (!Array.isArray(list) || list.some(pattern => typeof pattern !== 'string')) {
    throw new MoeError({
      code: 'E_ATTR',
      op,
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
        op,
        problem: `${pattern} is a folder`,
        fix: `say which of its files: '${slashed(join(pattern, '**', '*.txt'))}'`,
      })
    }
    const matches =
      kind === undefined ? globSync(slashed(pattern), { cwd, absolute: true, dot: false }) : [resolve(cwd, pattern)]
    if (matches.length === 0) {
      throw new MoeError({
        code: 'E_DATA',
        op,
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

/**
 * The documents of a UTF-8 file, those of white space alone left out.
 * @throws MoeError E_DATA
 */
export function readDocuments(op: string, path: string, separator: string | RegExp | undefined): string[] {
  const bytes = readBytes(op, path)
  if (separator === undefined) return [decode(op, path, bytes)]
  // Cut before it is decoded, so that only its documents must fit into strings.
  const parts =
    typeof separator === 'string' && separator !== ''
      ? cut(bytes, asIn(bytes, separator)).map(part => decode(op, path, part))
      : decode(op, path, bytes).split(separator)
  return parts.filter(part => part.trim().length > 0)
}

/** The bytes of a UTF-8 file, without the mark that some begin with. */
function readBytes(op: string, path: string): Buffer {
  let bytes: Buffer
  try {
    bytes = readFileSync(path)
  } catch (cause) {
    const tooLarge = (cause as NodeJS.ErrnoException).code === 'ERR_FS_FILE_TOO_LARGE'
    const fix = tooLarge ? 'cut it into smaller files' : undefined
    const problem = `${path} cannot be read: ${(cause as Error).message}`
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
 * The lines of a UTF-8 file, blank ones included.
 * @throws MoeError E_DATA
 */
export function readLines(op: string, path: string): string[] {
  return cut(readBytes(op, path), Buffer.from('\n')).map(line => decode(op, path, line))
}

/** A separator with the line ends of a text, by its first: CRLF, as Windows has them, or LF. */
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
      problem: `${path} has a document of ${bytes.length} bytes, and a string holds at most ${longest}`,
      fix: 'cut it into smaller files, or pass the text that separates its documents as { separator }',
      cause,
      details: { path },
    })
  }
}
