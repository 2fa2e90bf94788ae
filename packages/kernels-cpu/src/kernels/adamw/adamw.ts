/** @file AdamW, in place where nobody else holds the tensors. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

export const adamwStep: FusedFactory<'adamwStep'> = native => {
  const kernel = native.kernel('moe_adamw_step_f32')
  return ([param, grad, m, v, gradScale], { lr, beta1, beta2, eps, weightDecay, step }) => {
    const p = native.donated(param)
    const first = native.donated(m)
    const second = native.donated(v)
    const [pg, ps] = [pointerOf(grad), pointerOf(gradScale)]
    const size = sizeOf(param.shape)
    kernel(p.pointer, first.pointer, second.pointer, pg, ps, size, lr, beta1, beta2, eps, weightDecay, step)
    return [p, first, second]
  }
}
