/** @file Comparisons with numpy broadcasting. */
import { type CompareCode, sizeOf } from '@moe/core'
import type { CudaKernel } from '../../modules.ts'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'
import { broadcastNest } from '../binary/nest.ts'

const codes: readonly CompareCode[] = ['eq', 'lt', 'le']
const signature = 'p p p l i l[24]'

export const compare: PrimitiveFactory<'compare'> = cuda => {
  const kernels = new Map<string, CudaKernel>()
  for (const code of codes) {
    for (const dtype of ['f32', 'i32']) {
      kernels.set(code + dtype, cuda.kernel('compare', `moe_${code}_${dtype}`, signature))
    }
  }
  return ([a, b], { code }, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(spec.shape)
    const kernel = kernels.get(code + a.dtype) as CudaKernel
    const nest = broadcastNest(spec.shape, a.shape, b.shape)
    kernel({ grid: elementwiseGrid(cuda, n), block: 256 }, y.pointer, pointerOf(a), pointerOf(b), n, ...nest)
    return [y]
  }
}
