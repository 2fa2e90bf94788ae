/** @file Clipping by global norm, on the device. */
import { full, globalNorm, noGrad, type Parameter, scope, type Tensor } from '@moe/core'

/** Norm over all gradients present. Scalar on the device. */
export function gradientNorm(parameters: readonly Parameter[]): Tensor {
  const gradients = parameters.flatMap(({ grad }) => (grad === null ? [] : [grad]))
  return gradients.length === 0 ? full([], 0, { backend: parameters[0]?.backend }) : globalNorm(gradients)
}

/**
 * What gradients are multiplied by so that their norm is at most `limit`: `factor * min(1, limit / (factor * norm +
 * 1e-6))`, as torch.nn.utils.clip_grad_norm_. Scalar on the device; nothing is read back.
 * @param norm of the gradients before `factor`
 * @param limit no clipping when it is Infinity or 0
 * @param factor to apply in any case, e.g. the average over micro-batches
 */
export function clipScale(norm: Tensor, limit: number, factor: number | Tensor = 1): Tensor {
  const { backend } = norm
  const unlimited = limit === 0 || limit === Number.POSITIVE_INFINITY
  return scope(() =>
    noGrad(() => {
      if (unlimited) return typeof factor === 'number' ? full([], factor, { backend }) : factor.detach()
      return full([], limit, { backend }).div(norm.mul(factor).add(1e-6)).minimum(1).mul(factor)
    }),
  )
}
