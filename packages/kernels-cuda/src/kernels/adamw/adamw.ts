/** @file AdamW; updates in place if nobody else owns the tensors. */
import { type AdamwAttrs, sizeOf } from '@moe/core'
import { elementwiseGrid, type FusedFactory, pointerOf } from '../../native.ts'

/** The fields of the kernel's AdamwAttributes. */
function encode({ lr, beta1, beta2, eps, weightDecay, step }: AdamwAttrs): number[] {
  const rate = lr / (1 - beta1 ** step)
  const correction = 1 / (1 - beta2 ** step)
  return [1 - lr * weightDecay, beta1, 1 - beta1, beta2, 1 - beta2, rate, correction, eps]
}

export const adamwStep: FusedFactory<'adamwStep'> = cuda => {
  const signature = 'p p p p p p l'
  const kernels = {
    f32: cuda.kernel('adamw', 'moe_adamw_step_f32', signature),
    bf16: cuda.kernel('adamw', 'moe_adamw_step_bf16', signature),
  }
  return ([param, grad, m, v, gradScale], attrs) => {
    // In device memory, so that a recorded step can be replayed with another learning rate.
    const attributes = cuda.attributes('adamwStep', attrs, encode)
    const p = cuda.donated(param)
    const first = cuda.donated(m)
    const second = cuda.donated(v)
    const n = sizeOf(param.shape)
    const tensors = [p.pointer, first.pointer, second.pointer, pointerOf(grad), pointerOf(gradScale), attributes]
    kernels[m.dtype as keyof typeof kernels]({ grid: elementwiseGrid(cuda, n), block: 256 }, ...tensors, n)
    return [p, first, second]
  }
}
