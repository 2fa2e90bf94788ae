/** @file Folders and files on the disk, read without ever waiting on a pipe or device, or following a link that leads out. */

import { constants, type Stats } from 'node:fs'
import { type FileHandle, open, realpath, stat } from 'node:fs/promises'
import { isAbsolute, join, relative, sep } from 'node:path'
import { checkpointError, fileError } from './checkpoint-error.ts'
import type { Folder, OpenFile, Watch } from './folder.ts'

/** @param root folder that files must lie in after links are followed; default `path` */
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

/** Whether a path is that of a folder. @throws MoeError E_CHECKPOINT where there is nothing */
export async function namesFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory()
  } catch (cause) {
    throw fileError(path, 'opening', cause)
  }
}

/** Opens for reading without ever waiting on a pipe or device. */
export async function openOnDisk(path: string): Promise<OpenFile> {
  let handle: FileHandle | undefined
  try {
    refuseSpecial(path, await stat(path))
    // Not blocking, and checked again on the open file: the path may have changed in between.
    handle = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0))
    const stats = await handle.stat()
    refuseSpecial(path, stats)
    return diskFile(path, handle, stats.size)
  } catch (cause) {
    await handle?.close()
    throw fileError(path, 'opening', cause)
  }
}

/** Node refuses single reads of 2 GiB and more. */
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
  throw checkpointError(path, stats.isDirectory() ? 'is a folder, expected a file' : 'is not a regular file')
}

/** Links are followed before the comparison, so neither `..` nor a link leads out. */
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
      `is a link to ${target}, outside ${base}`,
      'copy the file, or pass { root } with a folder that holds both if you trust it',
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
