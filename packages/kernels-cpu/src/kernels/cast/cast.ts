/** @file Conversion between dtypes. */
import { type DType, dtypes, sizeOf } from '@moe/core'
import { type NativeKernel, type PrimitiveFactory, pointerOf } from '../../native.ts'

export const cast: PrimitiveFactory<'cast'> = native => {
  const kernels = new Map<DType, Map<DType, NativeKernel>>()
  for (const from of dtypes) kernels.set(from, new Map(dtypes.map(to => [to, native.kernel(`moe_cast_${from}_${to}`)])))
  return ([x], _attrs, [spec]) => {
    if (x.dtype === spec.dtype) return [native.shared(x)]
    const y = native.output(spec)
    const kernel = kernels.get(x.dtype)?.get(spec.dtype) as NativeKernel
    kernel(y.pointer, pointerOf(x), sizeOf(spec.shape))
    return [y]
  }
}
