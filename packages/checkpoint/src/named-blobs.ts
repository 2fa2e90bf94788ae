/** @file Files that are at hand: picked or dropped on a page, or made in memory. */

import { checkpointError, fileError } from './checkpoint-error.ts'
import type { Folder, OpenFile, Watch } from './folder.ts'

/** What is used of a `Blob`. */
export interface SlicedBytes {
  /** In bytes. */
  readonly size: number
  /** The part from `begin` up to `end`. */
  slice(begin: number, end: number): { arrayBuffer(): Promise<ArrayBuffer> }
}

/** What is used of a `File`. */
export interface NamedBlob extends SlicedBytes {
  /** Without folders. */
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
        throw checkpointError(folder, `${found.length} are called ${name}`, 'pass the files of one checkpoint')
      }
      return found.length === 0 ? undefined : watch.over(blobFile(name, found[0]))
    },
  }
}

export function blobFile(path: string, blob: SlicedBytes): OpenFile {
  return {
    path,
    bytes: blob.size,
    async read(into, offset, length, position) {
      try {
        const part = new Uint8Array(await blob.slice(position, position + length).arrayBuffer())
        into.set(part, offset)
        return part.length
      } catch (cause) {
        throw fileError(path, 'reading', cause, 'the file may have changed since it was chosen')
      }
    },
    close: async () => {},
  }
}
