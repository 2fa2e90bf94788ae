/** @file Fills a tensor with one value. */
import { bitsOf, sizeOf } from '@moe/core'
import { bySize, type PrimitiveFactory } from '../../native.ts'

export const fill: PrimitiveFactory<'fill'> = native => {
  const kernelFor = bySize(native, 'fill')
  return (_inputs, { value }, [spec]) => {
    const y = native.output(spec)
    kernelFor(spec.dtype)(y.pointer, sizeOf(spec.shape), bitsOf(value, spec.dtype))
    return [y]
  }
}
