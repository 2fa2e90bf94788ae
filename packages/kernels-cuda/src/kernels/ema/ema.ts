/** @file Exponential moving average; updates in place if nobody else owns the tensor. */
import { type EmaAttrs, sizeOf } from '@moe/core'
import { elementwiseGrid, type FusedFactory, pointerOf } from '../../native.ts'

const encode = ({ decay, step }: EmaAttrs) => [(1 - decay) / (1 - decay ** step)]

export const emaStep: FusedFactory<'emaStep'> = cuda => {
  const kernel = cuda.kernel('ema', 'moe_ema_step_f32', 'p p p l')
  return ([average, value], attrs) => {
    // In device memory, so that a recorded step can be replayed as a later one.
    const rate = cuda.attributes('emaStep', attrs, encode)
    const y = cuda.donated(average)
    const n = sizeOf(average.shape)
    kernel({ grid: elementwiseGrid(cuda, n), block: 256 }, y.pointer, pointerOf(value), rate, n)
    return [y]
  }
}
