/** @file An optimizer step for one tensor, and the norm over all gradients. */
import { needDtype, needList, needShape } from '../checks.ts'
import { full } from '../create.ts'
import type { AdamwAttrs } from '../ops.ts'
import { concat } from '../primitives.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const adamwStepDefinition: FusedDefinition<'adamwStep'> = {
  name: 'adamwStep',
  infer([param, grad, m, v, gradScale]) {
    for (const [name, value] of Object.entries({ param, grad, m, v })) needShape('adamwStep', name, value, param.shape)
    needDtype('adamwStep', 'param', param, 'f32')
    needDtype('adamwStep', 'grad', grad, 'f32')
    needDtype('adamwStep', 'm', m, 'f32', 'bf16')
    needDtype('adamwStep', 'v', v, m.dtype)
    needDtype('adamwStep', 'gradScale', gradScale, 'f32')
    needShape('adamwStep', 'gradScale', gradScale, [])
    return [param, m, v]
  },
  decompose([param, grad, m, v, gradScale], { lr, beta1, beta2, eps, weightDecay, step }) {
    const g = grad.mul(gradScale)
    const nextM = m
      .cast('f32')
      .mul(beta1)
      .add(g.mul(1 - beta1))
    const nextV = v
      .cast('f32')
      .mul(beta2)
      .add(g.mul(g).mul(1 - beta2))
    const denominator = nextV
      .mul(1 / (1 - beta2 ** step))
      .sqrt()
      .add(eps)
    const update = nextM.mul(lr / (1 - beta1 ** step)).div(denominator)
    return [param.mul(1 - lr * weightDecay).sub(update), nextM.cast(m.dtype), nextV.cast(v.dtype)]
  },
  vjp: null,
}

export const globalNormDefinition: FusedDefinition<'globalNorm'> = {
  name: 'globalNorm',
  infer(tensors, { parts }) {
    for (const value of tensors) needDtype('globalNorm', 'input', value, 'f32')
    return [{ shape: parts ? [3] : [], dtype: 'f32' }]
  },
  decompose(tensors, { parts }) {
    const squares = concat(tensors.map(x => x.mul(x).sum().reshape([1])))
    const norm = squares.sum().sqrt()
    return [parts ? concat([norm.reshape([1]), full([2], 0, norm)]) : norm]
  },
  vjp: null,
}

/**
 * Runs one step of AdamW with decoupled weight decay. `param`, `m` and `v` are used up: replace them by the results.
 * The gradient is multiplied by `gradScale []`, which allows clipping without reading anything back to the host. `m`
 * and `v` are both f32 or both bf16; bf16 moments are rounded only after the parameter was updated with the unrounded
 * values.
 */
export function adamwStep(
  param: Tensor,
  grad: Tensor,
  m: Tensor,
  v: Tensor,
  gradScale: Tensor,
  attrs: AdamwAttrs,
): { param: Tensor; m: Tensor; v: Tensor } {
  const [nextParam, nextM, nextV] = noGrad(() => runFused(adamwStepDefinition, [param, grad, m, v, gradScale], attrs))
  return { param: nextParam, m: nextM, v: nextV }
}

/** Returns the square root of the sum of squares over all tensors, a scalar on the device. */
export function globalNorm(tensors: readonly Tensor[]): Tensor {
  needList('globalNorm', 'the argument', tensors, 'pass an array of tensors')
  return noGrad(() => runFused(globalNormDefinition, tensors, { parts: false })[0])
}

/**
 * Returns the norm before it is rounded to f32, as far as the backend computes it that precisely: three numbers, `[3]`,
 * whose sum in f64 is the norm. Used to combine the norms of parts.
 */
export function globalNormParts(tensors: readonly Tensor[]): Tensor {
  return noGrad(() => runFused(globalNormDefinition, tensors, { parts: true })[0])
}
