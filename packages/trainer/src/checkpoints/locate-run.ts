/** @file Where a run is stored: in a folder on disk, or in a browser's directory handle. */
import { type DirectoryHandle, isDirectoryHandle } from '@moe/checkpoint'
import { DiskRun } from './disk-run.ts'
import { HandleRun } from './handle-run.ts'
import type { RunFolder } from './run-folder.ts'

/** Returns the storage of a run, without accessing it yet. @throws MoeError E_UNSUPPORTED for a path in a browser */
export const runFolder = (out: string | DirectoryHandle): RunFolder =>
  isDirectoryHandle(out) ? new HandleRun(out) : new DiskRun(out)
