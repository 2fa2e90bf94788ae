/** @file Files that appear complete or not at all. */

import { randomBytes } from 'node:crypto'
import { type FileHandle, open, rm } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { fileError } from './checkpoint-error.ts'
import { renamePatiently } from './rename-patiently.ts'

/** Appends bytes to the file being written. */
export type Append = (bytes: Uint8Array) => Promise<void>

/**
 * Writes a file through a temporary one in the same folder: written, flushed to the disk, renamed. If anything fails, a full
 * disk included, what stood at `path` before is untouched and the temporary file is removed.
 *
 * @param produce called once, with a function that appends
 * @throws {MoeError} `E_CHECKPOINT` for failures of the file system; errors of `produce` pass through
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
      await handle.sync()
      await handle.close()
      handle = undefined
      await renamePatiently(temporary, path)
    } catch (cause) {
      throw writeError(path, cause)
    }
  } catch (error) {
    await handle?.close().catch(() => {})
    await rm(temporary, { force: true }).catch(() => {})
    throw error
  }
  await syncFolder(dirname(path))
}

/** Node refuses single writes of 2 GiB and more. */
const MAX_WRITE_BYTES = 2 ** 30

/** Writes all bytes, in as many calls as the system wants. */
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
    'what was there before is unchanged; free some space, close what has the file open, or choose another folder, then save again',
  )

/** Makes a rename survive a power failure. Some systems cannot open or flush a folder; there the rename itself must do. */
export async function syncFolder(path: string): Promise<void> {
  try {
    const folder = await open(path, 'r')
    try {
      await folder.sync()
    } finally {
      await folder.close()
    }
  } catch {
    // Windows, and some network file systems.
  }
}
