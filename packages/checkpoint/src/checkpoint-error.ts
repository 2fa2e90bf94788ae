/** @file Errors of this package: always the file first, then the fault. */

import { isMoeError, MoeError } from '@moe/core'

/** An `E_CHECKPOINT` error whose message starts with the file, and whose `details` hold it with whatever else is given. */
export function checkpointError(
  file: string,
  problem: string,
  fix?: string,
  details: Record<string, unknown> = {},
  cause?: unknown,
): MoeError {
  return new MoeError({
    code: 'E_CHECKPOINT',
    op: file,
    problem,
    details: { file, ...details },
    ...(fix === undefined ? {} : { fix }),
    ...(cause === undefined ? {} : { cause }),
  })
}

/** A value from a file as JSON, cut short: a hostile file must not fill the log. */
export function shown(value: unknown): string {
  const text = JSON.stringify(value) ?? 'undefined'
  return text.length <= 120 ? text : `${text.slice(0, 100)}… (${text.length} characters)`
}

const systemFaults: Readonly<Record<string, string>> = {
  ENOENT: 'no such file or folder',
  ENOTDIR: 'a part of the path is not a folder',
  EISDIR: 'is a folder, expected a file',
  EACCES: 'permission denied',
  EPERM: 'operation not permitted',
  EBUSY: 'another program has it open',
  EROFS: 'the file system is read-only',
  ELOOP: 'too many symbolic links',
  EMFILE: 'too many open files',
  ENOSPC: 'no space left on the disk',
  EDQUOT: 'the disk quota is exceeded',
  EFBIG: 'the file would exceed the largest size allowed here',
}

/** Wraps a failure of the operating system; errors that already are ours pass through. */
export function fileError(file: string, doing: string, cause: unknown, fix?: string): MoeError {
  if (isMoeError(cause)) return cause
  const code = (cause as NodeJS.ErrnoException | undefined)?.code
  const fault = (code && systemFaults[code]) || (cause instanceof Error ? cause.message : String(cause))
  return checkpointError(file, `${doing} failed: ${fault}`, fix, code ? { errno: code } : {}, cause)
}
