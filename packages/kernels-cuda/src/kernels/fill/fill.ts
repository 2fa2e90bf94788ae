/** @file Fills a tensor with one value. */
import { bitsOf, dtypeBytes, sizeOf, type TensorSpec } from '@moe/core'
import { type Cuda, elementwiseGrid, type PrimitiveFactory } from '../../native.ts'

/** Factor that repeats the bits of an element of this size in a word. */
const repeat: Readonly<Record<number, number>> = { 1: 0x01010101, 2: 0x00010001, 4: 1 }

/** Fills the memory of a tensor. */
export function filler(cuda: Cuda) {
  const kernel = cuda.kernel('fill', 'moe_fill', 'p i l')
  return (to: number, { shape, dtype }: TensorSpec, value: number): void => {
    const size = dtypeBytes[dtype]
    const bytes = sizeOf(shape) * size
    const bits = bitsOf(value, dtype)
    if (bits === 0) cuda.clear(to, bytes)
    else kernel({ grid: elementwiseGrid(cuda, bytes / 4), block: 256 }, to, (bits * repeat[size]) | 0, bytes)
  }
}

export const fill: PrimitiveFactory<'fill'> = cuda => {
  const fillAll = filler(cuda)
  return (_inputs, { value }, [spec]) => {
    const y = cuda.output(spec)
    fillAll(y.pointer, spec, value)
    return [y]
  }
}
