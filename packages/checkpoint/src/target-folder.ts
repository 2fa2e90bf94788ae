/** @file The interface of folders that checkpoints are written to, and its implementation on disk. */

import { mkdir, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { type Append, writeAtomically } from './atomic-file.ts'
import { fileError } from './checkpoint-error.ts'
import { type DirectoryHandle, handleTarget, isDirectoryHandle } from './directory-handle.ts'
import { flushFolder } from './flush.ts'
import { pathOf } from './path-of.ts'

/** A folder to write to: a path, a file URL, or a folder handle of a browser. */
export type FolderLocation = string | URL | DirectoryHandle

/** A folder to write to. @internal */
export interface TargetFolder {
  /** Path, for error messages. */
  readonly path: string
  /** Path of a file in the folder, for error messages. */
  pathOf(name: string): string
  /** Names of the files in the folder, which is created if it does not exist. @throws MoeError E_CHECKPOINT */
  names(): Promise<Set<string>>
  /** Writes a file atomically. @throws MoeError E_CHECKPOINT, and any error of `produce` */
  write(name: string, produce: (append: Append) => Promise<void>): Promise<void>
  /** Removes a file if it exists. @throws MoeError E_CHECKPOINT */
  remove(name: string): Promise<void>
  /** Makes renames and removals durable across a power failure, if the system supports it. */
  flush(): Promise<void>
}

/**
 * Returns a location as a folder to write to, without accessing it yet.
 * @param op the calling function, for error messages
 * @throws MoeError E_ATTR for an invalid location
 * @internal
 */
export function targetFolder(op: string, location: FolderLocation): TargetFolder {
  return isDirectoryHandle(location) ? handleTarget(location) : diskTarget(pathOf(op, location))
}

/**
 * Returns a subfolder.
 * @param options.create creates the folder if it does not exist
 * @throws MoeError E_ATTR, E_CHECKPOINT
 * @internal
 */
export async function subfolder(
  op: string,
  location: FolderLocation,
  name: string,
  { create = false } = {},
): Promise<FolderLocation> {
  const { pathOf } = targetFolder(op, location)
  try {
    if (isDirectoryHandle(location)) return await location.getDirectoryHandle(name, { create })
    if (create) await mkdir(pathOf(name), { recursive: true })
    return pathOf(name)
  } catch (cause) {
    throw fileError(pathOf(name), 'opening', cause)
  }
}

/** Writes a text file atomically. @internal */
export const writeText = (folder: TargetFolder, name: string, text: string): Promise<void> =>
  folder.write(name, append => append(new TextEncoder().encode(text)))

export function diskTarget(path: string): TargetFolder {
  const pathOf = (name: string) => join(path, name)
  return {
    path,
    pathOf,
    async names() {
      try {
        await mkdir(path, { recursive: true })
        return new Set(await readdir(path))
      } catch (cause) {
        throw fileError(path, 'saving', cause)
      }
    },
    write: (name, produce) => writeAtomically(pathOf(name), produce),
    remove: name =>
      rm(pathOf(name), { force: true }).catch(cause => {
        throw fileError(pathOf(name), 'removing', cause)
      }),
    flush: () => flushFolder(path),
  }
}
