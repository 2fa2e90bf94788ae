/** @file A tensor of any stored dtype as f32, block scales included. */

import { checkOptions } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import { DEFAULT_BLOCK, dequantizeFp8Blocks } from './fp8-blocks.ts'
import type { TensorSource } from './read-safetensors.ts'
import { toF32 } from './to-f32.ts'

/** Layout of block scales. */
export interface ReadF32Options {
  /** Rows and columns of a scale block: `quantization_config.weight_block_size` of the config.json. Default 128 x 128. */
  readonly block?: readonly [number, number]
}

/** Name of the block scales that belong to a weight. */
export const scaleKey = (key: string): string => `${key}_scale_inv`

/** Whether a tensor is the block scales of a weight in the same source, and so not a weight itself. */
export const isScaleKey = (source: TensorSource, key: string): boolean =>
  key.endsWith('_scale_inv') && source.has(key.slice(0, -'_scale_inv'.length))

/**
 * Reads a tensor as f32: bf16, f16 and 8-bit floats are widened exactly, and an `f8e4m3` weight with a `<key>_scale_inv`
 * beside it (in whichever shard) is multiplied by its block scales.
 *
 * @throws {MoeError} `E_CHECKPOINT` as `read` does, for scales of a wrong shape, and for dtypes that are not plain numbers
 */
export async function readF32(
  source: TensorSource,
  key: string,
  options: ReadF32Options = {},
): Promise<{ shape: readonly number[]; data: Float32Array }> {
  checkOptions('readF32', options, { block: true })
  const { dtype, shape, data } = await source.read(key)
  if (dtype === 'f8e4m3' && source.has(scaleKey(key))) {
    const scale = await readF32(source, scaleKey(key))
    const where = `${source.info(key).file}: tensor ${shown(key)}`
    const block = options.block ?? DEFAULT_BLOCK
    return { shape, data: dequantizeFp8Blocks({ shape, data: data as Uint8Array }, scale, block, where) }
  }
  const values = toF32(dtype, data)
  if (!values) {
    throw checkpointError(source.info(key).file, `tensor ${shown(key)} is ${dtype}`, 'use read() and decode it', {
      key,
      dtype,
    })
  }
  return { shape, data: values }
}
