/** @file Comparisons with numpy broadcasting. */
import type { CompareCode } from '@moe/core'
import { broadcastNest } from '@moe/core/strides'
import { type NativeKernel, type PrimitiveFactory, pointerOf } from '../../native.ts'

const codes: readonly CompareCode[] = ['eq', 'lt', 'le']

export const compare: PrimitiveFactory<'compare'> = native => {
  const kernels = new Map<string, NativeKernel>()
  for (const code of codes) {
    kernels.set(`${code}f32`, native.kernel(`moe_${code}_f32`))
    kernels.set(`${code}i32`, native.kernel(`moe_${code}_i32`))
  }
  return ([a, b], { code }, [spec]) => {
    const y = native.output(spec)
    const kernel = kernels.get(code + a.dtype) as NativeKernel
    kernel(y.pointer, pointerOf(a), pointerOf(b), ...broadcastNest(spec.shape, a.shape, b.shape))
    return [y]
  }
}
