/** @file Exponential moving average; updates in place if nobody else owns the tensor. */
import { type EmaAttrs, sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

const encode = ({ decay, step }: EmaAttrs) => [decay, step]

export const emaStep: FusedFactory<'emaStep'> = native => {
  const kernel = native.kernel('moe_ema_step_f32')
  return ([average, value], attrs) => {
    const y = native.donated(average)
    kernel(y.pointer, pointerOf(value), sizeOf(average.shape), ...native.attrs('emaStep', attrs, encode))
    return [y]
  }
}
