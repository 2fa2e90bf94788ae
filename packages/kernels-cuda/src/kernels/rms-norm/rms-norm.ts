/** @file RMSNorm over the last axis, forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'
import { rowKernel, rowsOf } from '../softmax/row-kernel.ts'

export const rmsNorm: FusedFactory<'rmsNorm'> = cuda => {
  const forward = rowKernel(cuda, 'rms-norm', 'moe_rms_norm_fwd_f32', 'p p p p l i f')
  return ([x, weight], { eps }, [spec, rstdSpec]) => {
    const y = cuda.output(spec)
    const rstd = cuda.output(rstdSpec)
    const [rows, length] = rowsOf(x.shape)
    const { kernel, block, rowsPerBlock } = forward(length)
    const grid = Math.ceil(rows / rowsPerBlock)
    kernel({ grid, block }, y.pointer, rstd.pointer, pointerOf(x), pointerOf(weight), rows, length, eps)
    return [y, rstd]
  }
}

/** Minimum shared memory of a block, for its reductions. */
const reductionBytes = 256

export const rmsNormBackward: FusedFactory<'rmsNormBackward'> = cuda => {
  const backward = rowKernel(cuda, 'rms-norm', 'moe_rms_norm_bwd_f32', 'p p p p p p l i')
  const columnSums = cuda.kernel('rms-norm', 'moe_rms_norm_column_sums_f32', 'p p i i')
  return ([x, weight, rstd, dy], _attrs, [dxSpec, dweightSpec]) => {
    const [rows, length] = rowsOf(x.shape)
    const { kernel, block, rowsPerBlock } = backward(length)
    const shared = rowsPerBlock * Math.ceil(length / 4) * 16
    if (shared + reductionBytes > cuda.sharedMemory) return undefined
    const dx = cuda.output(dxSpec)
    const dweight = cuda.output(dweightSpec)
    // As many blocks as run concurrently: each writes a row of partial sums, which are added afterwards.
    const grid = Math.min(Math.ceil(rows / rowsPerBlock), cuda.multiprocessors * (512 / block))
    const partial = cuda.scratch(Math.max(1, grid) * length * 4)
    const [px, pw, pr, pdy] = [pointerOf(x), pointerOf(weight), pointerOf(rstd), pointerOf(dy)]
    kernel({ grid, block, shared }, dx.pointer, partial.pointer, px, pw, pr, pdy, rows, length)
    columnSums({ grid: Math.ceil(length / 32), block: 512 }, dweight.pointer, partial.pointer, grid, length)
    return [dx, dweight]
  }
}
