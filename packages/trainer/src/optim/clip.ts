/** @file Gradient clipping by global norm, on the device. */
import {
  type Backend,
  full,
  globalNorm,
  globalNormParts,
  noGrad,
  type Parameter,
  scope,
  type Tensor,
  zeros,
} from '@moe/core'

/** Returns the norm over all gradients that are present, as a scalar on the device. */
export function gradientNorm(parameters: readonly Parameter[]): Tensor {
  const gradients = parameters.flatMap(({ grad }) => (grad === null ? [] : [grad]))
  return gradients.length === 0 ? full([], 0, { backend: parameters[0]?.backend }) : globalNorm(gradients)
}

/** The parts of the gradient norm before rounding, as in `globalNormParts`. */
export function gradientNormParts(gradients: ReadonlyArray<Tensor | null>, backend: Backend): Tensor {
  const present = gradients.flatMap(gradient => gradient ?? [])
  return present.length === 0 ? zeros([3], { backend }) : globalNormParts(present)
}

/**
 * Returns the factor that limits the gradient norm: `factor * min(1, limit / (factor * norm + 1e-6))`, as in
 * torch.nn.utils.clip_grad_norm_. The result is a scalar on the device; nothing is read back.
 *
 * @param norm of the gradients before `factor`
 * @param limit maximum norm; Infinity or 0 disables clipping
 * @param factor always applied, for example to average over micro-batches
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
