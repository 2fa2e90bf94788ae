/** @file Weights stored as float8 with one scale for each block, as the released DeepSeek-V3 checkpoints are. */

import { checkpointError, shown } from './checkpoint-error.ts'
import { f8e4m3Table } from './to-f32.ts'

/** Rows and columns of a block in the released checkpoints (`quantization_config.weight_block_size`). */
export const DEFAULT_BLOCK: readonly [number, number] = [128, 128]

/**
 * `w[o, i] = q[o, i] * scale[o / block0, i / block1]`, with blocks cut off at the edges (deepseek-ai/DeepSeek-V3
 * `inference/kernel.py`, weight_dequant).
 *
 * @param q `f8e4m3` bit patterns, `[out, in]`
 * @param scale f32, `[ceil(out / block0), ceil(in / block1)]`; checkpoints call it `<weight>_scale_inv`
 * @param where names the tensor in errors
 * @returns f32 `[out, in]`
 * @throws {MoeError} `E_CHECKPOINT` when the shapes do not belong together
 */
export function dequantizeFp8Blocks(
  q: { readonly shape: readonly number[]; readonly data: Uint8Array },
  scale: { readonly shape: readonly number[]; readonly data: Float32Array },
  block: readonly [number, number] = DEFAULT_BLOCK,
  where = 'dequantizeFp8Blocks',
): Float32Array {
  const [rows, columns] = q.shape
  if (q.shape.length !== 2) {
    throw checkpointError(where, `a weight with block scales has two axes, this has the shape [${q.shape.join(', ')}]`)
  }
  if (!block.every(size => Number.isSafeInteger(size) && size > 0)) {
    throw checkpointError(
      where,
      `a block of ${shown(block)} cannot be`,
      'pass the weight_block_size of the config.json',
    )
  }
  const wanted = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])]
  if (scale.shape.length !== 2 || scale.shape[0] !== wanted[0] || scale.shape[1] !== wanted[1]) {
    throw checkpointError(
      where,
      `a weight [${rows}, ${columns}] in blocks of ${block[0]} x ${block[1]} needs scales [${wanted.join(', ')}], ` +
        `these are [${scale.shape.join(', ')}]`,
      'pass the weight_block_size of the config.json',
      { shape: q.shape, scaleShape: scale.shape, block },
    )
  }
  const table = f8e4m3Table()
  const out = new Float32Array(rows * columns)
  for (let row = 0; row < rows; row++) {
    const scales = Math.floor(row / block[0]) * wanted[1]
    for (let b = 0; b < wanted[1]; b++) {
      const factor = scale.data[scales + b]
      const end = row * columns + Math.min((b + 1) * block[1], columns)
      for (let i = row * columns + b * block[1]; i < end; i++) out[i] = table[q.data[i]] * factor
    }
  }
  return out
}
