/** @file Folders that a page has a handle of: the origin's own, kept by the browser, or one that a user picked. */

import { checkpointError, fileError } from './checkpoint-error.ts'
import type { Folder, Watch } from './folder.ts'
import { blobFile, type NamedBlob } from './named-blobs.ts'
import type { TargetFolder } from './target-folder.ts'

/**
 * What is used of a `FileSystemDirectoryHandle`: `await navigator.storage.getDirectory()`, a folder that the browser keeps for the origin, a folder in it, or one that
 * a user picked.
 */
export interface DirectoryHandle {
  /** Without folders; the origin's own has none. */
  readonly name: string
  /**
   * A file in it.
   * @param options.create make it where it is missing
   * @throws NotFoundError where there is none and none is to be made
   */
  getFileHandle(
    name: string,
    options?: { create?: boolean },
  ): Promise<{ getFile(): Promise<NamedBlob>; createWritable(): Promise<WritableFile> }>
  /**
   * A folder in it.
   * @param options.create make it where it is missing
   * @throws NotFoundError where there is none and none is to be made
   */
  getDirectoryHandle(name: string, options?: { create?: boolean }): Promise<DirectoryHandle>
  /**
   * Removes what is in it.
   * @param options.recursive also a folder that is not empty
   * @throws NotFoundError
   */
  removeEntry(name: string, options?: { recursive?: boolean }): Promise<void>
  /** Names of what is in it. */
  keys(): AsyncIterable<string>
}

/** What is used of a `FileSystemWritableFileStream`: the file changes when it is closed, as a whole. */
export interface WritableFile {
  /** Appends. */
  write(bytes: Uint8Array<ArrayBuffer>): Promise<void>
  /** Puts what was written into the place of the file. */
  close(): Promise<void>
  /** Leaves the file as it was. */
  abort(): Promise<void>
}

/** @internal */
export const isDirectoryHandle = (place: unknown): place is DirectoryHandle =>
  typeof place === 'object' && place !== null && 'getFileHandle' in place

const shownName = (handle: DirectoryHandle) => handle.name || "the origin's folder"
const pathIn = (handle: DirectoryHandle) => (name: string) => (handle.name ? `${handle.name}/${name}` : name)

export function handleFolder(handle: DirectoryHandle, watch: Watch): Folder {
  const pathOf = pathIn(handle)
  return {
    path: shownName(handle),
    pathOf,
    async open(name) {
      const file = await fileIn(handle, name)
      return file && watch.over(blobFile(pathOf(name), file))
    },
  }
}

export function handleTarget(handle: DirectoryHandle): TargetFolder {
  const path = shownName(handle)
  const pathOf = pathIn(handle)
  return {
    path,
    pathOf,
    async names() {
      try {
        const names = new Set<string>()
        for await (const name of handle.keys()) names.add(name)
        return names
      } catch (cause) {
        throw fileError(path, 'saving', cause)
      }
    },
    async write(name, produce) {
      // The file is there, empty, from when its handle is made.
      const before = await fileIn(handle, name)
      try {
        const file = await handle.getFileHandle(name, { create: true })
        const writable = await file.createWritable()
        try {
          await produce(bytes => writable.write(bytes as Uint8Array<ArrayBuffer>))
          await writable.close()
        } catch (error) {
          await writable.abort().catch(() => {})
          throw error
        }
      } catch (cause) {
        if (before === undefined) await handle.removeEntry(name).catch(() => {})
        throw isFault(cause) ? fileError(pathOf(name), 'writing', cause, writeFix) : cause
      }
    },
    async remove(name) {
      await handle.removeEntry(name).catch(cause => {
        if (!isMissing(cause)) throw fileError(pathOf(name), 'removing', cause)
      })
    },
    async flush() {},
  }
}

const writeFix = 'what was there before is unchanged; free some of the storage of the origin, then save again'

/** Undefined where there is no file of this name. */
async function fileIn(handle: DirectoryHandle, name: string): Promise<NamedBlob | undefined> {
  try {
    return await (await handle.getFileHandle(name)).getFile()
  } catch (cause) {
    if (isMissing(cause)) return undefined
    if (named(cause) === 'TypeMismatchError')
      throw checkpointError(pathIn(handle)(name), 'is a folder, expected a file')
    throw fileError(pathIn(handle)(name), 'opening', cause)
  }
}

const named = (cause: unknown) => (cause as Error | undefined)?.name
const isMissing = (cause: unknown) => named(cause) === 'NotFoundError'
/** What the browser says, and not whoever makes the bytes. */
const isFault = (cause: unknown) => typeof DOMException === 'function' && cause instanceof DOMException
