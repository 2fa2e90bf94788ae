/** @file SwiGLU, forward and backward. */
import { sizeOf } from '@moe/core'
import { elementwiseGrid, type FusedFactory, pointerOf } from '../../native.ts'

export const swiglu: FusedFactory<'swiglu'> = cuda => {
  const forward = cuda.kernel('swiglu', 'moe_swiglu_fwd_f32', 'p p p l')
  return ([gate, up], _attrs, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(spec.shape)
    forward({ grid: elementwiseGrid(cuda, n), block: 256 }, y.pointer, pointerOf(gate), pointerOf(up), n)
    return [y]
  }
}

export const swigluBackward: FusedFactory<'swigluBackward'> = cuda => {
  const backward = cuda.kernel('swiglu', 'moe_swiglu_bwd_f32', 'p p p p p l')
  return ([gate, up, dy], _attrs, [dgateSpec, dupSpec]) => {
    const dgate = cuda.output(dgateSpec)
    const dup = cuda.output(dupSpec)
    const n = sizeOf(dgateSpec.shape)
    const inputs = [pointerOf(gate), pointerOf(up), pointerOf(dy)]
    backward({ grid: elementwiseGrid(cuda, n), block: 256 }, dgate.pointer, dup.pointer, ...inputs, n)
    return [dgate, dup]
  }
}
