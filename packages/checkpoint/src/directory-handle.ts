/** @file Folders in browsers: `FileSystemDirectoryHandle`, in the origin's private storage or picked by the user. */

import { checkpointError, fileError } from './checkpoint-error.ts'
import type { Folder, TargetFolder, Watch } from './folder.ts'
import { blobFile, type NamedBlob } from './named-blobs.ts'

/**
 * The part of `FileSystemDirectoryHandle` that this package uses. A handle refers to the origin's private storage
 * (`await navigator.storage.getDirectory()`), a folder in it, or a folder that the user picked.
 */
export interface DirectoryHandle {
  /** Name of the folder without its path; empty for the root of the origin's private storage. */
  readonly name: string
  /**
   * Returns the handle of a file in the folder.
   * @param options.create creates the file if it does not exist
   * @throws NotFoundError if it does not exist and `create` is not set
   */
  getFileHandle(
    name: string,
    options?: { create?: boolean },
  ): Promise<{ getFile(): Promise<NamedBlob>; createWritable(): Promise<WritableFile> }>
  /**
   * Returns the handle of a subfolder.
   * @param options.create creates the folder if it does not exist
   * @throws NotFoundError if it does not exist and `create` is not set
   */
  getDirectoryHandle(name: string, options?: { create?: boolean }): Promise<DirectoryHandle>
  /**
   * Removes a file or subfolder.
   * @param options.recursive also removes folders that are not empty
   * @throws NotFoundError if it does not exist
   */
  removeEntry(name: string, options?: { recursive?: boolean }): Promise<void>
  /** Names of all files and subfolders. */
  keys(): AsyncIterable<string>
}

/** The part of `FileSystemWritableFileStream` that this package uses. The file changes only when the stream is closed. */
export interface WritableFile {
  /** Appends bytes. */
  write(bytes: Uint8Array<ArrayBuffer>): Promise<void>
  /** Replaces the file with the written bytes. */
  close(): Promise<void>
  /** Discards the written bytes; the file stays unchanged. */
  abort(): Promise<void>
}

/** @internal */
export const isDirectoryHandle = (location: unknown): location is DirectoryHandle =>
  typeof location === 'object' && location !== null && 'getFileHandle' in location

const shownName = (handle: DirectoryHandle) => handle.name || "the origin's private storage"
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
      // Creating the handle already creates an empty file.
      const before = await fileIn(handle, name)
      // Errors of `produce` are passed on.
      const checked = <T>(work: Promise<T>) =>
        work.catch(cause => {
          throw fileError(pathOf(name), 'writing', cause, writeFix)
        })
      try {
        const file = await checked(handle.getFileHandle(name, { create: true }))
        const writable = await checked(file.createWritable())
        try {
          await produce(bytes => checked(writable.write(bytes as Uint8Array<ArrayBuffer>)))
          await checked(writable.close())
        } catch (error) {
          await writable.abort().catch(() => {})
          throw error
        }
      } catch (error) {
        if (before === undefined) await handle.removeEntry(name).catch(() => {})
        throw error
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

const writeFix = 'an existing file is unchanged; free storage of this origin, then save again'

/** Returns undefined if there is no such file. */
async function fileIn(handle: DirectoryHandle, name: string): Promise<NamedBlob | undefined> {
  try {
    return await (await handle.getFileHandle(name)).getFile()
  } catch (cause) {
    if (isMissing(cause)) return undefined
    if (errorName(cause) === 'TypeMismatchError')
      throw checkpointError(pathIn(handle)(name), 'expected a file, got a folder')
    throw fileError(pathIn(handle)(name), 'opening', cause)
  }
}

const errorName = (cause: unknown) => (cause as Error | undefined)?.name
const isMissing = (cause: unknown) => errorName(cause) === 'NotFoundError'
