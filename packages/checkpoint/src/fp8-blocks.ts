/** @file Dequantizes fp8 weights with one scale per block, the format of the released DeepSeek-V3 checkpoints. */

import { checkpointError, shown } from './checkpoint-error.ts'
import { f8e4m3Table } from './to-f32.ts'

/** Rows and columns of a block in the released checkpoints (`quantization_config.weight_block_size`). */
export const DEFAULT_BLOCK: readonly [number, number] = [128, 128]

/**
 * Dequantizes a weight: `w[o, i] = q[o, i] * scale[o / block0, i / block1]`. Blocks are cut off at the edges of the matrix
 * (deepseek-ai/DeepSeek-V3 `inference/kernel.py`, weight_dequant).
 *
 * @param q `f8e4m3` bit patterns, `[out, in]`
 * @param scale f32, `[ceil(out / block0), ceil(in / block1)]`; named `<weight>_scale_inv` in checkpoints
 * @param block rows and columns of a block
 * @param where names the tensor in error messages
 * @returns f32, `[out, in]`
 * @throws {MoeError} `E_CHECKPOINT` if the shapes do not match
 */
export function dequantizeFp8Blocks(
  q: { readonly shape: readonly number[]; readonly data: Uint8Array },
  scale: { readonly shape: readonly number[]; readonly data: Float32Array },
  block: readonly [number, number] = DEFAULT_BLOCK,
  where = 'dequantizeFp8Blocks',
): Float32Array {
  const [rows, columns] = q.shape
  if (q.shape.length !== 2) {
    throw checkpointError(where, `expected a matrix with block scales, got the shape [${q.shape.join(', ')}]`)
  }
  if (!block.every(size => Number.isSafeInteger(size) && size > 0)) {
    throw checkpointError(
      where,
      `expected two positive block sizes, got ${shown(block)}`,
      'pass weight_block_size of the config.json',
    )
  }
  const wanted = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])]
  if (scale.shape.length !== 2 || scale.shape[0] !== wanted[0] || scale.shape[1] !== wanted[1]) {
    throw checkpointError(
      where,
      `a weight [${rows}, ${columns}] in blocks of ${block[0]} x ${block[1]} needs scales [${wanted.join(', ')}], ` +
        `got [${scale.shape.join(', ')}]`,
      'pass weight_block_size of the config.json',
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
