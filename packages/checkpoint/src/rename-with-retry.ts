/** @file Retries file operations that Windows refuses while another process has a file open. */

import { rename } from 'node:fs/promises'
import { setTimeout } from 'node:timers/promises'

/** Error codes on Windows while another process has one of the files open. */
const busy: ReadonlySet<string | undefined> = new Set(['EPERM', 'EACCES', 'EBUSY'])

/** Milliseconds between attempts. */
const pauses = [10, 30, 100, 300, 600]

/**
 * Renames a file or folder, replacing an existing file. Windows refuses this while another process has one of the files open, and virus
 * scanners and indexers briefly open new files. Such a failure is therefore retried for about a second.
 *
 * @throws the error of the last attempt, as `rename` of `node:fs`
 * @internal
 */
export async function renameWithRetry(from: string, to: string): Promise<void> {
  await retryWhileBusy(() => rename(from, to))
}

/**
 * Retries an operation for about a second if it fails because another process has a file open (on Windows).
 * @throws the error of the last attempt; other errors immediately
 * @internal
 */
export async function retryWhileBusy<T>(attempt: () => T | Promise<T>): Promise<T> {
  for (const pause of pauses) {
    try {
      return await attempt()
    } catch (error) {
      if (!busy.has((error as NodeJS.ErrnoException).code)) throw error
    }
    await setTimeout(pause)
  }
  return attempt()
}
