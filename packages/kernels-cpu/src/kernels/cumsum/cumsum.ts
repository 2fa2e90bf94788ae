/** @file Cumulative sums along one axis. */
import { sizeOf } from '@moe/core'
import { type PrimitiveFactory, pointerOf } from '../../native.ts'

export const cumsum: PrimitiveFactory<'cumsum'> = native => {
  const f32 = native.kernel('moe_cumsum_f32')
  const i32 = native.kernel('moe_cumsum_i32')
  return ([x], { axis }, [spec]) => {
    const y = native.output(spec)
    const outer = sizeOf(x.shape.slice(0, axis))
    const inner = sizeOf(x.shape.slice(axis + 1))
    const kernel = spec.dtype === 'f32' ? f32 : i32
    kernel(y.pointer, pointerOf(x), outer, x.shape[axis], inner)
    return [y]
  }
}
