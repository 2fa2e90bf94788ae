/** @file Fills a tensor with one value. */
import { bitsOf, dtypeBytes, sizeOf } from '@moe/core'
import { elementwiseGrid, type PrimitiveFactory } from '../../native.ts'

/** Factor that repeats the bits of an element of this size in a word. */
const repeat: Readonly<Record<number, number>> = { 1: 0x01010101, 2: 0x00010001, 4: 1 }

export const fill: PrimitiveFactory<'fill'> = cuda => {
  const kernel = cuda.kernel('fill', 'moe_fill', 'p i l')
  return (_inputs, { value }, [spec]) => {
    const y = cuda.output(spec)
    const size = dtypeBytes[spec.dtype]
    const bytes = sizeOf(spec.shape) * size
    const bits = bitsOf(value, spec.dtype)
    if (bits === 0) cuda.clear(y.pointer, bytes)
    else kernel({ grid: elementwiseGrid(cuda, bytes / 4), block: 256 }, y.pointer, bits * repeat[size], bytes)
    return [y]
  }
}
