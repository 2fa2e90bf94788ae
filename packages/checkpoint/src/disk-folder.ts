/** @file Folders and files on disk. Opening never blocks on a pipe or device and never follows a link out of the folder. Writing is atomic. */

import { constants, type Stats } from 'node:fs'
import { type FileHandle, mkdir, open, readdir, realpath, rm, stat } from 'node:fs/promises'
import { isAbsolute, join, relative, sep } from 'node:path'
import { writeAtomically } from './atomic-file.ts'
import { checkpointError, fileError } from './checkpoint-error.ts'
import { flushFolder } from './flush.ts'
import type { Folder, OpenFile, TargetFolder, Watch } from './folder.ts'

/** @param root folder that must contain the files after symbolic links are resolved; default `path` */
export function diskFolder(path: string, root: string | undefined, watch: Watch): Folder {
  return {
    path,
    pathOf: name => join(path, name),
    async open(name) {
      const file = join(path, name)
      if (!(await exists(file))) return undefined
      await refuseOutside(file, root ?? path)
      return watch.over(await openOnDisk(file))
    },
  }
}

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

/** Whether a path is a folder. @throws MoeError E_CHECKPOINT if it does not exist */
export async function namesFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory()
  } catch (cause) {
    throw fileError(path, 'opening', cause)
  }
}

/** Opens a regular file for reading, without blocking on pipes or devices. */
export async function openOnDisk(path: string): Promise<OpenFile> {
  let handle: FileHandle | undefined
  try {
    refuseSpecial(path, await stat(path))
    // Non-blocking, and checked again on the open file, because the path may have changed in between.
    handle = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0))
    const stats = await handle.stat()
    refuseSpecial(path, stats)
    return diskFile(path, handle, stats.size)
  } catch (cause) {
    await handle?.close()
    throw fileError(path, 'opening', cause)
  }
}

/** Node rejects single reads of 2 GiB or more. */
const MAX_READ_BYTES = 2 ** 30

function diskFile(path: string, handle: FileHandle, bytes: number): OpenFile {
  return {
    path,
    bytes,
    async read(into, offset, length, position) {
      try {
        return (await handle.read(into, offset, Math.min(length, MAX_READ_BYTES), position)).bytesRead
      } catch (cause) {
        throw fileError(path, 'reading', cause)
      }
    },
    close: () => handle.close(),
  }
}

function refuseSpecial(path: string, stats: Stats): void {
  if (stats.isFile()) return
  throw checkpointError(path, stats.isDirectory() ? 'expected a file, got a folder' : 'not a regular file')
}

/** Resolves links before comparing, so that neither `..` nor a symbolic link leads out of `root`. */
async function refuseOutside(path: string, root: string): Promise<void> {
  let target: string
  let base: string
  try {
    target = await realpath(path)
    base = await realpath(root)
  } catch (cause) {
    throw fileError(path, 'opening', cause)
  }
  const way = relative(base, target)
  if (way === '..' || way.startsWith(`..${sep}`) || isAbsolute(way)) {
    throw checkpointError(
      path,
      `it is a link to ${target}, outside of ${base}`,
      'copy the file, or, if you trust it, pass { root } with a folder that contains both',
      { target, root: base },
    )
  }
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    (cause: NodeJS.ErrnoException) => {
      if (cause.code === 'ENOENT') return false
      throw fileError(path, 'opening', cause)
    },
  )
}
