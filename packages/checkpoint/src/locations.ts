/** @file Resolves the locations a checkpoint can be read from (disk, web, folder handles, and `File` objects) and written to (disk and folder handles). */

import { mkdir } from 'node:fs/promises'
import { MoeError } from '@moe/core'
import { fileError } from './checkpoint-error.ts'
import { type DirectoryHandle, handleFolder, handleTarget, isDirectoryHandle } from './directory-handle.ts'
import { diskFolder, diskTarget, namesFolder, openOnDisk } from './disk-folder.ts'
import { type Folder, type FolderOptions, type OpenFile, type TargetFolder, Watch } from './folder.ts'
import { blobFolder, type NamedBlob } from './named-blobs.ts'
import { pathOf, webAddress } from './path-of.ts'
import { webFile, webFolder } from './web-folder.ts'

/**
 * Where a checkpoint is: a path, a file URL, an `http(s):` address as a string or URL, a folder handle of a browser, or its files, for
 * example of `<input type="file" multiple>`.
 */
export type CheckpointLocation = string | URL | DirectoryHandle | Iterable<NamedBlob>

/** A folder to write to: a path, a file URL, or a folder handle of a browser. */
export type FolderLocation = string | URL | DirectoryHandle

/**
 * Returns the folder of a location, without accessing it yet.
 * @param op the calling function, for error messages
 * @throws MoeError E_ATTR for an invalid location
 * @internal
 */
export function openFolder(op: string, location: CheckpointLocation, options: FolderOptions = {}): Folder {
  const address = webAddress(op, location)
  if (isDiskPath(op, location)) return diskFolder(pathOf(op, location), options.root, new Watch(options))
  refuseRoot(op, options)
  if (address) return webFolder(address, options.fetch, new Watch(options))
  if (isDirectoryHandle(location)) return handleFolder(location, new Watch(options))
  return blobFolder(location as Iterable<NamedBlob>, new Watch(options))
}

/**
 * Returns the folder of a location and, if the location names a file, the file name.
 * @throws MoeError E_CHECKPOINT if a path does not exist
 */
export async function locate(
  op: string,
  location: CheckpointLocation,
  options: FolderOptions,
): Promise<{ readonly folder: Folder; readonly file?: string }> {
  const address = webAddress(op, location)
  if (address) {
    const [, above, file] = /^(.*\/)([^/]+\.(?:safetensors|json))$/.exec(address.pathname) ?? []
    if (file === undefined) return { folder: openFolder(op, address, options) }
    const parent = new URL(address)
    parent.pathname = above
    return { folder: openFolder(op, parent, options), file: decoded(file) }
  }
  if (!isDiskPath(op, location)) return { folder: openFolder(op, location, options) }
  const path = pathOf(op, location)
  const [, above, file] = (await namesFolder(path)) ? [] : (/^(.*[/\\])?([^/\\]+)$/.exec(path) ?? [])
  if (file === undefined) return { folder: openFolder(op, path, options) }
  return { folder: openFolder(op, above ?? '.', options), file }
}

/** Opens the file that a location names. On disk it may be a symbolic link to any location. */
export async function openFile(op: string, location: string | URL, options: FolderOptions): Promise<OpenFile> {
  const address = webAddress(op, location)
  if (!address) return new Watch(options).over(await openOnDisk(pathOf(op, location)))
  refuseRoot(op, options)
  return await webFile(address, options.fetch, new Watch(options))
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

/** Whether the location is a path or a file URL. @internal */
export const isDiskPath = (op: string, location: CheckpointLocation): location is string | URL =>
  !isBlobs(location) && !isDirectoryHandle(location) && webAddress(op, location) === undefined

const isBlobs = (location: CheckpointLocation): location is Iterable<NamedBlob> =>
  typeof location === 'object' && location !== null && Symbol.iterator in location

function refuseRoot(op: string, { root }: FolderOptions): void {
  if (root === undefined) return
  throw new MoeError({ code: 'E_ATTR', op, problem: `root ${root} applies only to files on disk`, fix: 'omit root' })
}

/** Decodes a percent-encoded name; invalid encodings are returned unchanged. */
function decoded(name: string): string {
  try {
    return decodeURIComponent(name)
  } catch {
    return name
  }
}
