/** @file Elementwise ops of two arguments with numpy broadcasting. */
import { type BinaryCode, sizeOf } from '@moe/core'
import type { CudaKernel } from '../../modules.ts'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'
import { broadcastNest } from './nest.ts'

const codes: readonly BinaryCode[] = ['add', 'sub', 'mul', 'div', 'max', 'min', 'pow']
const signature = 'p p p l i l[24]'

export const binary: PrimitiveFactory<'binary'> = cuda => {
  const kernels = new Map<string, CudaKernel>()
  for (const code of codes) {
    kernels.set(`${code}f32`, cuda.kernel('binary', `moe_${code}_f32`, signature))
    if (code !== 'pow') kernels.set(`${code}i32`, cuda.kernel('binary', `moe_${code}_i32`, signature))
  }
  return ([a, b], { code }, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(spec.shape)
    const kernel = kernels.get(code + spec.dtype) as CudaKernel
    const nest = broadcastNest(spec.shape, a.shape, b.shape)
    kernel({ grid: elementwiseGrid(cuda, n), block: 256 }, y.pointer, pointerOf(a), pointerOf(b), n, ...nest)
    return [y]
  }
}
