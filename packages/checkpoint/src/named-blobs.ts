/** @file Checkpoints from `File` objects, which a user picked or dropped on a page, or which were created in memory. */

import { checkpointError, fileError } from './checkpoint-error.ts'
import type { Folder, OpenFile, Watch } from './folder.ts'

/** The part of `Blob` that this package uses. */
export interface SlicedBytes {
  /** Size in bytes. */
  readonly size: number
  /** Returns the bytes from `begin` (inclusive) to `end` (exclusive). */
  slice(begin: number, end: number): { arrayBuffer(): Promise<ArrayBuffer> }
}

/** The part of `File` that this package uses. */
export interface NamedBlob extends SlicedBytes {
  /** File name without folders. */
  readonly name: string
}

export function blobFolder(blobs: Iterable<NamedBlob>, watch: Watch): Folder {
  const all = [...blobs]
  const folder = 'the given files'
  return {
    path: folder,
    pathOf: name => name,
    async open(name) {
      const found = all.filter(blob => blob.name === name)
      if (found.length > 1) {
        throw checkpointError(folder, `${found.length} files are named ${name}`, 'pass the files of one checkpoint')
      }
      return found.length === 0 ? undefined : watch.over(blobFile(name, found[0]))
    },
  }
}

/** Maximum size of a read, since a blob's part is copied, and browsers limit its size. */
const MAX_READ_BYTES = 2 ** 26

export function blobFile(path: string, blob: SlicedBytes): OpenFile {
  return {
    path,
    bytes: blob.size,
    async read(into, offset, length, position) {
      try {
        const end = position + Math.min(length, MAX_READ_BYTES)
        const part = new Uint8Array(await blob.slice(position, end).arrayBuffer())
        into.set(part, offset)
        return part.length
      } catch (cause) {
        throw fileError(path, 'reading', cause, 'the file may have changed since it was selected')
      }
    },
    close: async () => {},
  }
}
