/** @file Which checkpoint a training starts from. */
import { MoeError } from '@moe/core'
import type { TrainOptions } from '../options.ts'
import type { RunFolder, StoredCheckpoint } from './run-folder.ts'

/**
 * Returns the checkpoint to resume from, or undefined to start from the beginning.
 *
 * @throws MoeError E_CHECKPOINT if there is none to resume from, E_CONFIG if a run exists that must not be replaced
 */
export async function startingPoint(
  folder: RunFolder,
  { resume = false, overwrite = false }: Pick<TrainOptions, 'resume' | 'overwrite'>,
): Promise<StoredCheckpoint | undefined> {
  if (typeof resume === 'string' && resume !== 'auto') return await folder.named(resume)
  const latest = await folder.latest()
  if (resume === true && latest === undefined) {
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: 'train',
      problem: `there is no checkpoint to resume from in ${folder.path}`,
      fix: "start without resume, or pass resume: 'auto'",
    })
  }
  if (resume === false && latest !== undefined && !overwrite) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: `${folder.path} already contains a run (${latest.path})`,
      fix: 'continue it with resume: true, choose another out, or replace it with overwrite: true',
    })
  }
  return resume === false ? undefined : latest
}
