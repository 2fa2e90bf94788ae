/** @file RMSNorm over the last axis, forward and backward. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

export const rmsNorm: FusedFactory<'rmsNorm'> = native => {
  const kernel = native.kernel('moe_rms_norm_fwd_f32')
  return ([x, weight], { eps }, [spec, rstdSpec]) => {
    const y = native.output(spec)
    const rstd = native.output(rstdSpec)
    kernel(y.pointer, rstd.pointer, pointerOf(x), pointerOf(weight), sizeOf(rstdSpec.shape), weight.shape[0], eps)
    return [y, rstd]
  }
}

export const rmsNormBackward: FusedFactory<'rmsNormBackward'> = native => {
  const kernel = native.kernel('moe_rms_norm_bwd_f32')
  return ([x, weight, rstd, dy], _attrs, [dxSpec, dweightSpec]) => {
    const dx = native.output(dxSpec)
    const dweight = native.output(dweightSpec)
    const [px, pw, pr, pdy] = [pointerOf(x), pointerOf(weight), pointerOf(rstd), pointerOf(dy)]
    kernel(dx.pointer, dweight.pointer, px, pw, pr, pdy, sizeOf(rstd.shape), weight.shape[0])
    return [dx, dweight]
  }
}
