/** @file fp8 weights with one scale per block, the format of the released DeepSeek-V3 checkpoints. */

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
  const [, across] = checkScales(q.shape, scale.shape, block, where)
  const table = f8e4m3Table()
  const out = new Float32Array(rows * columns)
  for (let row = 0; row < rows; row++) {
    const scales = Math.floor(row / block[0]) * across
    for (let b = 0; b < across; b++) {
      const factor = scale.data[scales + b]
      const end = row * columns + Math.min((b + 1) * block[1], columns)
      for (let i = row * columns + b * block[1]; i < end; i++) out[i] = table[q.data[i]] * factor
    }
  }
  return out
}

/**
 * Returns the scales of the same codes in blocks of another size, or undefined if such a block would need several scales.
 * @throws {MoeError} `E_CHECKPOINT` if the shapes do not match
 */
export function scalesInBlocks(
  shape: readonly number[],
  scale: { readonly shape: readonly number[]; readonly data: Float32Array },
  block: readonly [number, number],
  wanted: readonly [number, number],
  where: string,
): Float32Array | undefined {
  const [, across] = checkScales(shape, scale.shape, block, where)
  const isInside = (axis: 0 | 1) => block[axis] >= shape[axis] || block[axis] % wanted[axis] === 0
  if (!isInside(0) || !isInside(1)) return undefined
  const [down, wide] = [Math.ceil(shape[0] / wanted[0]), Math.ceil(shape[1] / wanted[1])]
  return Float32Array.from({ length: down * wide }, (_, i) => {
    const [row, column] = [Math.floor(i / wide) * wanted[0], (i % wide) * wanted[1]]
    return scale.data[Math.floor(row / block[0]) * across + Math.floor(column / block[1])]
  })
}

/** Checks the shape of scales and returns it. */
function checkScales(
  shape: readonly number[],
  scales: readonly number[],
  block: readonly [number, number],
  where: string,
): readonly number[] {
  const [rows, columns] = shape
  if (shape.length !== 2) {
    throw checkpointError(where, `expected a matrix with block scales, got the shape [${shape.join(', ')}]`)
  }
  if (!block.every(size => Number.isSafeInteger(size) && size > 0)) {
    throw checkpointError(
      where,
      `expected two positive block sizes, got ${shown(block)}`,
      'pass weight_block_size of the config.json',
    )
  }
  const wanted = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])]
  if (scales.length !== 2 || scales[0] !== wanted[0] || scales[1] !== wanted[1]) {
    throw checkpointError(
      where,
      `a weight [${rows}, ${columns}] in blocks of ${block[0]} x ${block[1]} needs scales [${wanted.join(', ')}], ` +
        `got [${scales.join(', ')}]`,
      'pass weight_block_size of the config.json',
      { shape, scaleShape: scales, block },
    )
  }
  return wanted
}
