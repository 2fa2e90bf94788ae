/** @file Softmax over the last axis, forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'
import { rowKernel, rowsOf } from './row-kernel.ts'

export const softmax: FusedFactory<'softmax'> = cuda => {
  const forward = rowKernel(cuda, 'softmax', 'moe_softmax_fwd_f32', 'p p l i')
  return ([x], _attrs, [spec]) => {
    const y = cuda.output(spec)
    const [rows, length] = rowsOf(x.shape)
    const { kernel, block, rowsPerBlock } = forward(length)
    kernel({ grid: Math.ceil(rows / rowsPerBlock), block }, y.pointer, pointerOf(x), rows, length)
    return [y]
  }
}

export const softmaxBackward: FusedFactory<'softmaxBackward'> = cuda => {
  const backward = rowKernel(cuda, 'softmax', 'moe_softmax_bwd_f32', 'p p p l i')
  return ([y, dy], _attrs, [spec]) => {
    const dx = cuda.output(spec)
    const [rows, length] = rowsOf(y.shape)
    const { kernel, block, rowsPerBlock } = backward(length)
    kernel({ grid: Math.ceil(rows / rowsPerBlock), block }, dx.pointer, pointerOf(y), pointerOf(dy), rows, length)
    return [dx]
  }
}
