/** @file Conversion between dtypes. */
import { dtypes, sizeOf } from '@moe/core'
import type { CudaKernel } from '../../modules.ts'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'

export const cast: PrimitiveFactory<'cast'> = cuda => {
  const kernels = new Map<string, CudaKernel>()
  for (const from of dtypes) {
    for (const to of dtypes) {
      if (from !== to) kernels.set(`${from} ${to}`, cuda.kernel('cast', `moe_cast_${from}_${to}`, 'p p l'))
    }
  }
  return ([x], _attrs, [spec]) => {
    if (x.dtype === spec.dtype) return [cuda.shared(x)]
    const y = cuda.output(spec)
    const n = sizeOf(spec.shape)
    const kernel = kernels.get(`${x.dtype} ${spec.dtype}`) as CudaKernel
    kernel({ grid: elementwiseGrid(cuda, n), block: 256 }, y.pointer, pointerOf(x), n)
    return [y]
  }
}
