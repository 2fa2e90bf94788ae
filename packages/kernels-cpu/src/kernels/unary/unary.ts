/** @file Elementwise ops of one argument. */
import { sizeOf, type UnaryCode } from '@moe/core'
import { type NativeKernel, type PrimitiveFactory, pointerOf } from '../../native.ts'

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

export const unary: PrimitiveFactory<'unary'> = native => {
  const kernels = new Map<string, NativeKernel>()
  for (const code of codes) kernels.set(`${code}f32`, native.kernel(`moe_${code}_f32`))
  for (const code of ['neg', 'abs', 'sign']) kernels.set(`${code}i32`, native.kernel(`moe_${code}_i32`))
  return ([x], { code }, [spec]) => {
    const y = native.output(spec)
    const kernel = kernels.get(code + spec.dtype) as NativeKernel
    kernel(y.pointer, pointerOf(x), sizeOf(x.shape))
    return [y]
  }
}
