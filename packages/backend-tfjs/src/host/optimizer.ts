/** @file The optimizer step and the norm of gradients, in one pass each. */
import type { AdamwAttrs, TensorSpec, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { f32Of, type Host } from './memory.ts'

const f32View = (host: Host, tensor: TfTensor): Float32Array => host.view(tensor) as Float32Array

/** param, m and v are donated, but new tensors are created: see `setRows`. */
export function adamwStep(
  host: Host,
  [param, grad, m, v, gradScale]: readonly Value[],
  { lr, beta1, beta2, eps, weightDecay, step }: AdamwAttrs,
  specs: readonly TensorSpec[],
) {
  const outputs = specs.map(({ shape }) => host.output(shape, 'float32'))
  const [nextP, nextM, nextV] = outputs.map(tensor => f32View(host, tensor))
  const [p, g0, m0, v0] = [param, grad, m, v].map(value => f32Of(host, value))
  const scale = f32Of(host, gradScale)[0]
  const decay = 1 - lr * weightDecay
  const rate = lr / (1 - beta1 ** step)
  const correction = 1 / (1 - beta2 ** step)
  for (let i = 0; i < p.length; i++) {
    const g = g0[i] * scale
    const first = beta1 * m0[i] + (1 - beta1) * g
    const second = beta2 * v0[i] + (1 - beta2) * g * g
    nextM[i] = first
    nextV[i] = second
    nextP[i] = p[i] * decay - (rate * first) / (Math.sqrt(second * correction) + eps)
  }
  return outputs
}

export function globalNorm(host: Host, tensors: readonly Value[], _: unknown, [spec]: readonly TensorSpec[]) {
  const out = host.output(spec.shape, 'float32')
  let sum = 0
  for (const value of tensors) {
    const x = f32Of(host, value)
    for (let i = 0; i < x.length; i++) sum += x[i] * x[i]
  }
  let rest = Math.sqrt(sum)
  const floats = host.view(out)
  for (let i = 0; i < floats.length; i++) {
    floats[i] = rest
    rest -= floats[i]
  }
  return [out]
}
