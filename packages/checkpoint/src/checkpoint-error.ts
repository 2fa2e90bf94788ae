/** @file Errors of this package. Their messages start with the file. */

import { isMoeError, MoeError } from '@moe/core'

/** Creates an `E_CHECKPOINT` error whose message starts with the file and whose `details` contain it. */
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

/** Formats a value from a file as JSON, truncated so that a malicious file cannot flood the log. */
export function shown(value: unknown): string {
  const text = JSON.stringify(value) ?? 'undefined'
  return text.length <= 120 ? text : `${text.slice(0, 100)}… (${text.length} characters)`
}

const systemErrors: Readonly<Record<string, string>> = {
  ENOENT: 'no such file or folder',
  ENOTDIR: 'part of the path is not a folder',
  EISDIR: 'expected a file, got a folder',
  EACCES: 'permission denied',
  EPERM: 'operation not permitted',
  EBUSY: 'another program has it open',
  EROFS: 'the file system is read-only',
  ELOOP: 'too many symbolic links',
  EMFILE: 'too many open files',
  ENOSPC: 'no space left on the disk',
  EDQUOT: 'the disk quota is exceeded',
  EFBIG: 'the file exceeds the maximum file size',
}

/** Wraps an error of the operating system. A `MoeError` is returned unchanged. */
export function fileError(file: string, doing: string, cause: unknown, fix?: string): MoeError {
  if (isMoeError(cause)) return cause
  const code = (cause as NodeJS.ErrnoException | undefined)?.code
  const fault = (code && systemErrors[code]) || (cause instanceof Error ? cause.message : String(cause))
  return checkpointError(file, `${doing} failed: ${fault}`, fix, code ? { errno: code } : {}, cause)
}
