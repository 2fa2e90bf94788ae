/** @file The k largest elements of each row. */
import { sizeOf } from '@moe/core'
import { type PrimitiveFactory, pointerOf } from '../../native.ts'

export const topk: PrimitiveFactory<'topk'> = native => {
  const kernel = native.kernel('moe_topk_f32')
  return ([x], { k }, [valuesSpec, indicesSpec]) => {
    const values = native.output(valuesSpec)
    const indices = native.output(indicesSpec)
    kernel(values.pointer, indices.pointer, pointerOf(x), sizeOf(valuesSpec.shape) / k, x.shape[x.shape.length - 1], k)
    return [values, indices]
  }
}
