/** @file Elementwise ops of one argument. */
import { sizeOf, type UnaryCode } from '@moe/core'
import type { CudaKernel } from '../../modules.ts'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'

const codes: readonly UnaryCode[] = [
  'neg',
  'abs',
  'sign',
  'exp',
  'log',
  'sqrt',
  'rsqrt',
  'sin',
  'cos',
  'tanh',
  'sigmoid',
  'floor',
]

export const unary: PrimitiveFactory<'unary'> = cuda => {
  const kernels = new Map<string, CudaKernel>()
  for (const code of codes) kernels.set(`${code}f32`, cuda.kernel('unary', `moe_${code}_f32`, 'p p l'))
  for (const code of ['neg', 'abs', 'sign']) kernels.set(`${code}i32`, cuda.kernel('unary', `moe_${code}_i32`, 'p p l'))
  return ([x], { code }, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(spec.shape)
    const kernel = kernels.get(code + spec.dtype) as CudaKernel
    kernel({ grid: elementwiseGrid(cuda, n), block: 256 }, y.pointer, pointerOf(x), n)
    return [y]
  }
}
