/** @file Flushes files and folders to disk. */

import { fsync } from 'node:fs'
import { open } from 'node:fs/promises'

/**
 * Flushes a file to disk, like `FileHandle.sync`, which Yarn's Plug'n'Play does not implement.
 * @throws the error of `fsync` of `node:fs`
 * @internal
 */
export function flushFile({ fd }: { readonly fd: number }): Promise<void> {
  return new Promise((resolve, reject) => fsync(fd, error => (error ? reject(error) : resolve())))
}

/** Makes renames in a folder durable across a power failure, on systems that can flush a folder. @internal */
export async function flushFolder(path: string): Promise<void> {
  try {
    const folder = await open(path, 'r')
    try {
      await flushFile(folder)
    } finally {
      await folder.close()
    }
  } catch {
    // Windows and some network file systems cannot.
  }
}
