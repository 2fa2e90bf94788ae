/** @file SwiGLU, forward and backward. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

export const swiglu: FusedFactory<'swiglu'> = native => {
  const kernel = native.kernel('moe_swiglu_fwd_f32')
  return ([gate, up], _attrs, [spec]) => {
    const y = native.output(spec)
    kernel(y.pointer, pointerOf(gate), pointerOf(up), sizeOf(gate.shape))
    return [y]
  }
}

export const swigluBackward: FusedFactory<'swigluBackward'> = native => {
  const kernel = native.kernel('moe_swiglu_bwd_f32')
  return ([gate, up, dy], _attrs, [dgateSpec, dupSpec]) => {
    const dgate = native.output(dgateSpec)
    const dup = native.output(dupSpec)
    kernel(dgate.pointer, dup.pointer, pointerOf(gate), pointerOf(up), pointerOf(dy), sizeOf(gate.shape))
    return [dgate, dup]
  }
}
