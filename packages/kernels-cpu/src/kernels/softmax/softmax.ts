/** @file Softmax over the last axis, forward and backward. */
import { type Shape, sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

const rowsOf = (shape: Shape) => sizeOf(shape.slice(0, -1))
const lengthOf = (shape: Shape) => shape[shape.length - 1]

export const softmax: FusedFactory<'softmax'> = native => {
  const kernel = native.kernel('moe_softmax_fwd_f32')
  return ([x], _attrs, [spec]) => {
    const y = native.output(spec)
    kernel(y.pointer, pointerOf(x), rowsOf(x.shape), lengthOf(x.shape))
    return [y]
  }
}

export const softmaxBackward: FusedFactory<'softmaxBackward'> = native => {
  const kernel = native.kernel('moe_softmax_bwd_f32')
  return ([y, dy], _attrs, [spec]) => {
    const dx = native.output(spec)
    kernel(dx.pointer, pointerOf(y), pointerOf(dy), rowsOf(y.shape), lengthOf(y.shape))
    return [dx]
  }
}
