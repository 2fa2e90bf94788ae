/** @file Block-wise 8-bit quantization (DeepSeek-V3 report 3.3: 1x128 for activations, 128x128 for weights). */
import { attrError, needDtype, needList, needShape } from '../checks.ts'
import { full } from '../create.ts'
import { f8e4m3Max } from '../dtype.ts'
import { where } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const quantizeDefinition: FusedDefinition<'quantize'> = {
  name: 'quantize',
  infer([x], { block }) {
    needDtype('quantize', 'input', x, 'f32')
    needShape('quantize', 'input', x, [-1, -1])
    needList('quantize', 'block', block)
    if (block.length !== 2 || !block.every(size => Number.isInteger(size) && size >= 1)) {
      throw attrError('quantize', `block = [${block}] is invalid`, 'pass two positive integers, such as [128, 128]')
    }
    return [
      { shape: x.shape, dtype: 'f8e4m3' },
      { shape: [Math.ceil(x.shape[0] / block[0]), Math.ceil(x.shape[1] / block[1])], dtype: 'f32' },
    ]
  },
  decompose([x], { block }) {
    const [rows, columns] = x.shape
    const [blockRows, blockColumns] = block
    const down = Math.ceil(rows / blockRows)
    const across = Math.ceil(columns / blockColumns)
    const padded = x.pad([0, 0], [down * blockRows - rows, across * blockColumns - columns])
    const blocks = padded.reshape([down, blockRows, across, blockColumns])
    const largest = blocks.abs().max([1, 3], true)
    const quotient = largest.div(f8e4m3Max)
    const scale = where(quotient.eq(0), full([], 1, quotient), quotient)
    const scaled = blocks.div(scale).reshape(padded.shape).slice([0, 0], [rows, columns])
    return [scaled.cast('f8e4m3'), scale.reshape([down, across])]
  },
  vjp: null,
}

/**
 * Quantizes `x [R, C]` to f8e4m3 with one f32 scale per block: `q [R, C]`, `scale [ceil(R/br), ceil(C/bc)]`, x = q *
 * scale. Blocks are cropped at the edges.
 * @throws MoeError E_SHAPE, E_DTYPE, E_ATTR
 */
export function quantize(x: Tensor, block: readonly [number, number] = [128, 128]): { q: Tensor; scale: Tensor } {
  const [q, scale] = runFused(quantizeDefinition, [x], { block })
  return { q, scale }
}
