/** @file A folder to write to, whatever it is on. */

import { mkdir, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { type Append, syncFolder, writeAtomically } from './atomic-file.ts'
import { fileError } from './checkpoint-error.ts'
import { type DirectoryHandle, handleTarget, isDirectoryHandle } from './directory-handle.ts'
import { pathOf } from './path-of.ts'

/** Where a folder is that is written: a path, a file URL, or the handle that a page has of it. */
export type FolderPlace = string | URL | DirectoryHandle

/** A folder to write to. @internal */
export interface TargetFolder {
  /** What errors call it. */
  readonly path: string
  /** What errors call a file of it. */
  pathOf(name: string): string
  /** Of what is in it. It is made where it is missing. @throws MoeError E_CHECKPOINT */
  names(): Promise<Set<string>>
  /** Writes a file that appears complete or not at all. @throws MoeError E_CHECKPOINT, and what `produce` throws */
  write(name: string, produce: (append: Append) => Promise<void>): Promise<void>
  /** Removes a file that may be missing. @throws MoeError E_CHECKPOINT */
  remove(name: string): Promise<void>
  /** Makes the names in it survive a power failure, where that can be asked for. */
  flush(): Promise<void>
}

/**
 * The place as a folder to write to; nothing is asked of it yet.
 * @param op who asks, for errors
 * @throws MoeError E_ATTR for what is no place
 * @internal
 */
export function targetFolder(op: string, place: FolderPlace): TargetFolder {
  return isDirectoryHandle(place) ? handleTarget(place) : diskTarget(pathOf(op, place))
}

/**
 * A folder in a folder.
 * @param options.create make it where it is missing
 * @throws MoeError E_ATTR, E_CHECKPOINT
 * @internal
 */
export async function folderIn(
  op: string,
  place: FolderPlace,
  name: string,
  { create = false } = {},
): Promise<FolderPlace> {
  const { pathOf } = targetFolder(op, place)
  try {
    if (isDirectoryHandle(place)) return await place.getDirectoryHandle(name, { create })
    if (create) await mkdir(pathOf(name), { recursive: true })
    return pathOf(name)
  } catch (cause) {
    throw fileError(pathOf(name), 'opening', cause)
  }
}

/** Writes text as a whole. @internal */
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
    flush: () => syncFolder(path),
  }
}
