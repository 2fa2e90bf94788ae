/** @file AdamW, in place where nobody else holds the tensors. */
import { type AdamwAttrs, sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

const encode = ({ lr, beta1, beta2, eps, weightDecay, step }: AdamwAttrs) => [lr, beta1, beta2, eps, weightDecay, step]

export const adamwStep: FusedFactory<'adamwStep'> = native => {
  const kernel = native.kernel('moe_adamw_step_f32')
  return ([param, grad, m, v, gradScale], attrs) => {
    const p = native.donated(param)
    const first = native.donated(m)
    const second = native.donated(v)
    const [pg, ps] = [pointerOf(grad), pointerOf(gradScale)]
    const size = sizeOf(param.shape)
    kernel(p.pointer, first.pointer, second.pointer, pg, ps, size, ...native.attrs('adamwStep', attrs, encode))
    return [p, first, second]
  }
}
