/** @file Finds the model of a run or of a checkpoint. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { type DirectoryHandle, isDirectoryHandle, openFolder, pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError } from '@moe/core'
import { latestCheckpoint, STATE_FILE } from './checkpoint-folder.ts'
import { HandleRun } from './handle-run.ts'
import { EMA_FOLDER, MODEL_FOLDER } from './save-load.ts'

const CONFIG_FILES = ['config.json', 'adapter_config.json']

/** Options of `modelFolder`. */
export interface ModelFolderOptions {
  /** Returns the model with the averaged weights, for runs with the `ema` option. Default false. */
  readonly ema?: boolean | undefined
}

/**
 * Returns the folder of a model or of adapters: `folder` itself if it contains a config.json or adapter_config.json,
 * otherwise the model in the checkpoint `folder`, or in the latest checkpoint of the run in `folder`. In a browser, pass
 * a directory handle to get a promise of one.
 *
 * @throws MoeError E_CHECKPOINT if `folder` contains no model, or has no averaged weights and `ema` is set
 */
export function modelFolder(folder: string | URL, options?: ModelFolderOptions): string
export function modelFolder(folder: DirectoryHandle, options?: ModelFolderOptions): Promise<DirectoryHandle>
export function modelFolder(
  folder: string | URL | DirectoryHandle,
  options: ModelFolderOptions = {},
): string | Promise<DirectoryHandle> {
  checkOptions('modelFolder', options, { ema: true })
  const { ema = false } = options
  if (isDirectoryHandle(folder)) return inHandle(folder, ema)
  const path = pathOf('modelFolder', folder)
  if (!ema && CONFIG_FILES.some(name => existsSync(join(path, name)))) return path
  const checkpoint = existsSync(join(path, STATE_FILE)) ? path : latestCheckpoint(path)
  if (checkpoint === undefined) throw neither(path)
  const model = join(checkpoint, ema ? EMA_FOLDER : MODEL_FOLDER)
  if (ema && !existsSync(model)) throw notAveraged(checkpoint)
  return model
}

async function inHandle(folder: DirectoryHandle, ema: boolean): Promise<DirectoryHandle> {
  const { open, path } = openFolder('modelFolder', folder)
  if (!ema) for (const name of CONFIG_FILES) if (await open(name)) return folder
  const checkpoint = (await open(STATE_FILE)) ? { path, location: folder } : await new HandleRun(folder).latest()
  if (checkpoint === undefined) throw neither(path)
  const { location } = checkpoint
  if (!ema) return await location.getDirectoryHandle(MODEL_FOLDER)
  return await location.getDirectoryHandle(EMA_FOLDER).catch(() => {
    throw notAveraged(checkpoint.path)
  })
}

const notAveraged = (checkpoint: string) =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: 'modelFolder',
    problem: `${checkpoint} has no averaged weights`,
    fix: 'omit ema to get the weights themselves; train with { ema: 0.999 } to average them',
  })

const neither = (path: string) =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: 'modelFolder',
    problem: `${path} has neither a config.json nor checkpoints`,
    fix: 'pass the folder of a model, of a checkpoint, or of a run: the `out` of train(), or runs/quickstart after `npm start`',
  })
