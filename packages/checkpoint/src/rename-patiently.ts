/** @file Work on files that waits until others have let go of them. */

import { rename } from 'node:fs/promises'
import { setTimeout } from 'node:timers/promises'

/** What Windows answers while somebody has one of the files open. */
const busy: ReadonlySet<string | undefined> = new Set(['EPERM', 'EACCES', 'EBUSY'])

/** Milliseconds between one attempt and the next. */
const pauses = [10, 30, 100, 300, 600]

/**
 * Renames a file or a folder, replacing a file. Windows refuses that while anybody has one of the files open (in a folder: a file in it), and virus
 * scanners and indexers open what has just been written for a moment. So a refusal counts only when it lasts for about a second.
 *
 * @throws the error of the last attempt, as `rename` of `node:fs`
 * @internal
 */
export async function renamePatiently(from: string, to: string): Promise<void> {
  await patiently(() => rename(from, to))
}

/**
 * Does what Windows refuses while somebody has one of the files open, and again until it works or about a second has passed.
 * @throws the error of the last attempt, and at once any other
 * @internal
 */
export async function patiently<T>(attempt: () => T | Promise<T>): Promise<T> {
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
