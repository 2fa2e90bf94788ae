/** @file Replaces the weights of a model. */
import { type CheckpointLocation, type FolderOptions, folderOptionNames, openFolder } from '@moe/checkpoint'
import { checkOptions } from '@moe/core'
import { openWeights } from './config-file.ts'
import type { DeepSeek } from './model.ts'
import { fillWeights } from './pretrained.ts'

/**
 * Loads the weights of a checkpoint folder, on disk or from the web, into a model. bf16, f16 and fp8 weights become f32; config.json gives the size of fp8 blocks.
 * @throws MoeError E_STATE_DICT if keys or shapes do not match; the model then stays unchanged
 */
export async function loadWeights(
  model: DeepSeek,
  location: CheckpointLocation,
  options: FolderOptions = {},
): Promise<void> {
  checkOptions('loadWeights', options, folderOptionNames)
  await using weights = await openWeights(openFolder('loadWeights', location, options))
  await fillWeights(model, weights)
}
