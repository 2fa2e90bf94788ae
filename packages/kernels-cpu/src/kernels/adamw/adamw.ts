/** @file AdamW; updates in place if nobody else owns the tensors. */
import { type AdamwAttrs, sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

const encode = ({ lr, beta1, beta2, eps, weightDecay, step }: AdamwAttrs) => [lr, beta1, beta2, eps, weightDecay, step]

export const adamwStep: FusedFactory<'adamwStep'> = native => {
  const kernels = {
    f32: native.kernel('moe_adamw_step_f32'),
    bf16: native.kernel('moe_adamw_step_bf16'),
  }
  return ([param, grad, m, v, gradScale], attrs) => {
    const p = native.donated(param, true)
    const first = native.donated(m)
    const second = native.donated(v)
    const [pg, ps] = [pointerOf(grad), pointerOf(gradScale)]
    const size = sizeOf(param.shape)
    native.withRounded(p, rounded => {
      const values = native.attrs('adamwStep', attrs, encode)
      kernels[m.dtype as keyof typeof kernels](
        p.pointer,
        rounded,
        first.pointer,
        second.pointer,
        pg,
        ps,
        size,
        ...values,
      )
    })
    return [p, first, second]
  }
}
