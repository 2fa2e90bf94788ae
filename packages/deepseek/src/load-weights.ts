/** @file Replaces the weights of a model. */
import { type CheckpointLocation, type FolderOptions, folderOptionNames, openFolder } from '@moe/checkpoint'
import { checkOptions, type LoadOptions } from '@moe/core'
import { openWeights } from './config-file.ts'
import type { DeepSeek } from './model.ts'
import { fillWeights } from './pretrained.ts'

/**
 * Loads the weights of a checkpoint folder, on disk or from the web, into a model. bf16, f16 and fp8 weights become f32; config.json gives the size of fp8 blocks.
 * @param options.parameters the parameters to load, if a rank has only a part of the model: `weights` of an `ExpertParallel` or `Pipeline`. Default: all
 * @throws MoeError E_STATE_DICT if keys or shapes do not match; the model then stays unchanged
 */
export async function loadWeights(
  model: DeepSeek,
  location: CheckpointLocation,
  options: FolderOptions & Pick<LoadOptions, 'parameters'> = {},
): Promise<void> {
  checkOptions('loadWeights', options, { ...folderOptionNames, parameters: true })
  const { parameters, ...reading } = options
  await using weights = await openWeights(openFolder('loadWeights', location, reading))
  await fillWeights(model, weights, { parameters })
}
