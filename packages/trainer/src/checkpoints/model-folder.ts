/** @file Where the model of a run is. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { type DirectoryHandle, isDirectoryHandle, openFolder, pathOf } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { latestCheckpoint } from './checkpoint-folder.ts'
import { HandleRun } from './handle-run.ts'
import { MODEL_FOLDER } from './save-load.ts'

const CONFIG_FILES = ['config.json', 'adapter_config.json']

/**
 * Folder of a model, or of adapters: the one given where it holds a config.json or an adapter_config.json, else that in the latest checkpoint of the run it is of. A
 * path for a path; in a page, for the handle of a folder, a promise of one.
 * @throws MoeError E_CHECKPOINT when it is neither
 */
export function modelFolder(folder: string | URL): string
export function modelFolder(folder: DirectoryHandle): Promise<DirectoryHandle>
export function modelFolder(folder: string | URL | DirectoryHandle): string | Promise<DirectoryHandle> {
  if (isDirectoryHandle(folder)) return inHandle(folder)
  const path = pathOf('modelFolder', folder)
  if (CONFIG_FILES.some(name => existsSync(join(path, name)))) return path
  const checkpoint = latestCheckpoint(path)
  if (checkpoint !== undefined) return join(checkpoint, MODEL_FOLDER)
  throw neither(path)
}

async function inHandle(folder: DirectoryHandle): Promise<DirectoryHandle> {
  const { open, path } = openFolder('modelFolder', folder)
  for (const name of CONFIG_FILES) if (await open(name)) return folder
  const checkpoint = await new HandleRun(folder).latest()
  if (checkpoint !== undefined) return await checkpoint.place.getDirectoryHandle(MODEL_FOLDER)
  throw neither(path)
}

const neither = (path: string) =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: 'modelFolder',
    problem: `${path} has neither a config.json nor checkpoints`,
    fix: 'pass the folder of a model, or of a run: the `out` of train(), or runs/quickstart after `npm start`',
  })
