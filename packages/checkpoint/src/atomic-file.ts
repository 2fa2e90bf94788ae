/** @file Writes files atomically. */

import { randomBytes } from 'node:crypto'
import { type FileHandle, open, rm } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { fileError } from './checkpoint-error.ts'
import { flushFile, flushFolder } from './flush.ts'
import { renameWithRetry } from './rename-with-retry.ts'

/** Appends bytes to the file that is being written. */
export type Append = (bytes: Uint8Array) => Promise<void>

/**
 * Writes a file atomically: to a temporary file in the same folder, which is flushed to disk and renamed. If anything fails, including
 * a full disk, an existing file at `path` stays unchanged and the temporary file is removed.
 *
 * @param produce called once, with a function that appends bytes
 * @throws {MoeError} `E_CHECKPOINT` if the file system fails; errors of `produce` are passed on
 */
export async function writeAtomically(path: string, produce: (append: Append) => Promise<void>): Promise<void> {
  const temporary = join(dirname(path), `.${basename(path)}.${process.pid}.${randomBytes(4).toString('hex')}.tmp`)
  let handle: FileHandle | undefined
  try {
    handle = await open(temporary, 'wx').catch(cause => {
      throw writeError(path, cause)
    })
    const file = handle
    await produce(bytes => writeAll(file, path, bytes))
    try {
      await flushFile(handle)
      await handle.close()
      handle = undefined
      await renameWithRetry(temporary, path)
    } catch (cause) {
      throw writeError(path, cause)
    }
  } catch (error) {
    await handle?.close().catch(() => {})
    await rm(temporary, { force: true }).catch(() => {})
    throw error
  }
  await flushFolder(dirname(path))
}

/** Node rejects single writes of 2 GiB or more. */
const MAX_WRITE_BYTES = 2 ** 30

/** Writes all bytes, in as many calls as needed. */
export async function writeAll(file: Pick<FileHandle, 'write'>, path: string, bytes: Uint8Array): Promise<void> {
  let done = 0
  while (done < bytes.length) {
    try {
      done += (await file.write(bytes, done, Math.min(bytes.length - done, MAX_WRITE_BYTES))).bytesWritten
    } catch (cause) {
      throw writeError(path, cause)
    }
  }
}

const writeError = (path: string, cause: unknown) =>
  fileError(
    path,
    'writing',
    cause,
    (cause as NodeJS.ErrnoException | undefined)?.code === 'ENOENT'
      ? `create the folder ${dirname(path)} first`
      : 'an existing file is unchanged; free disk space, close programs that have the file open, or choose another folder, then save again',
  )
