/**
 * @file Balancers: small stateless objects, one per model, that provide a balance loss and update the selection bias.
 */
import { checkOptions, MoeError, type Parameter, shown, type Tensor } from '@moe/core'
import {
  communicationBalanceLoss,
  deviceBalanceLoss,
  expertBalanceLoss,
  type RoutingPass,
  sequenceBalanceLoss,
  updateBias,
} from './balance.ts'

/** A constant, or a function of the number of completed optimizer steps. */
export type Scheduled = number | ((step: number) => number)

/** Returns the value of a schedule at a step. @throws MoeError E_ATTR if it is not a finite number */
export function scheduled(value: Scheduled, step: number): number {
  const factor = typeof value === 'function' ? value(step) : value
  if (Number.isFinite(factor)) return factor
  throw new MoeError({
    code: 'E_ATTR',
    op: 'balance',
    problem: `the factor at step ${step} is ${shown(factor)}`,
    fix: 'pass a finite number, or a function of the step that returns one',
  })
}

/**
 * Balances the load of a layer's experts, by a loss or by updates of the selection bias. It has no state, so one
 * balancer serves all layers.
 */
export interface Balancer {
  /**
   * Returns a scalar to add to the training loss, including its factor, or null for none. `step` is the number of
   * completed optimizer steps.
   */
  loss?(pass: RoutingPass, step: number): Tensor | null
  /**
   * Updates the selection bias from the loads `i32 [E]` of the whole batch. Called once per optimizer step, inside `scope` and
   * `noGrad`.
   */
  update?(bias: Parameter, load: Tensor, step: number): void
}

/** Checks that a value is a balancer, and not, for example, a function that creates one. @throws MoeError E_CONFIG */
export function needBalancer(op: string, balancer: unknown): void {
  if (typeof balancer === 'object' && balancer !== null) return
  const problem = `the balancer is ${shown(balancer)}`
  throw new MoeError({ code: 'E_CONFIG', op, problem, fix: 'pass the result of a function such as auxFree()' })
}

/** Creates a balancer that does nothing. */
export const noBalance = (): Balancer => ({})

/**
 * Creates V3's auxiliary-loss-free balancer. γ, the `speed`, may follow a schedule; default 0.001. V3 uses 0.001, and 0
 * for the last 3% of training. For `center`, see `BiasUpdateOptions`.
 */
export function auxFree(options: { speed?: Scheduled; center?: boolean } = {}): Balancer {
  checkOptions('auxFree', options, { speed: true, center: true })
  const { speed = 0.001, center } = options
  return { update: (bias, load, step) => updateBias(bias, load, { speed: scheduled(speed, step), center }) }
}

/** A balance loss whose factor may follow a schedule. Nothing is computed while the factor is 0. */
function lossBalancer(alpha: Scheduled, loss: (pass: RoutingPass) => Tensor): Balancer {
  return {
    loss(pass, step) {
      const factor = scheduled(alpha, step)
      return factor === 0 ? null : loss(pass).mul(factor)
    },
  }
}

/** Creates a balancer with V3's sequence-wise loss, times `alpha` (default 1e-4, as in V3). */
export function sequenceWise(options: { alpha?: Scheduled } = {}): Balancer {
  checkOptions('sequenceWise', options, { alpha: true })
  return lossBalancer(options.alpha ?? 1e-4, ({ scores, sequences, indices, mask }) =>
    sequenceBalanceLoss(scores, sequences, indices.shape[1], mask),
  )
}

/** Creates a balancer with V2's expert-level loss, times `alpha` (default 0.003, V2's α1). */
export function expertLevel(options: { alpha?: Scheduled } = {}): Balancer {
  checkOptions('expertLevel', options, { alpha: true })
  return lossBalancer(options.alpha ?? 0.003, expertBalanceLoss)
}

/**
 * Creates a balancer with V2's device-level loss, times `alpha` (default 0.05, V2's α2). Each of the `devices` has
 * consecutive experts, like the groups of the gate.
 */
export function deviceLevel(options: { devices: number; alpha?: Scheduled }): Balancer {
  checkOptions('deviceLevel', options, { devices: true, alpha: true })
  return lossBalancer(options.alpha ?? 0.05, pass =>
    deviceBalanceLoss(pass, dividing(pass.scores.shape[1], options.devices)),
  )
}

/**
 * Creates a balancer with V2's communication loss, times `alpha` (default 0.02, V2's α3). `limit` is the number of
 * `devices` that a token may be sent to.
 * @throws MoeError E_ATTR
 */
export function communication(options: { devices: number; limit: number; alpha?: Scheduled }): Balancer {
  checkOptions('communication', options, { devices: true, limit: true, alpha: true })
  const { devices, limit, alpha = 0.02 } = options
  if (!Number.isInteger(limit) || limit < 1 || limit > devices) {
    const problem = `limit = ${limit} is not in 1..devices = ${devices}`
    const fix = 'pass the number of devices that a token may be sent to (topk_group)'
    throw new MoeError({ code: 'E_ATTR', op: 'communication', problem, fix })
  }
  return lossBalancer(alpha, pass => communicationBalanceLoss(pass, dividing(pass.scores.shape[1], devices), limit))
}

/**
 * Combines several balancers: losses are added, and biases updated by each in turn.
 * @throws MoeError E_CONFIG if one is not a balancer
 */
export function combineBalancers(...balancers: readonly Balancer[]): Balancer {
  for (const balancer of balancers) needBalancer('combineBalancers', balancer)
  return {
    loss(pass, step) {
      const losses = balancers.map(balancer => balancer.loss?.(pass, step) ?? null).filter(loss => loss !== null)
      return losses.length === 0 ? null : losses.reduce((sum, loss) => sum.add(loss))
    },
    ...(balancers.some(balancer => balancer.update) && {
      update(bias, load, step) {
        for (const balancer of balancers) balancer.update?.(bias, load, step)
      },
    }),
  }
}

/** Returns the number of devices, after checking that it divides that of experts. Internal. @throws MoeError E_ATTR */
export function dividing(experts: number, devices: number): number {
  if (Number.isInteger(devices) && devices >= 1 && experts % devices === 0) return devices
  throw new MoeError({
    code: 'E_ATTR',
    op: 'balance',
    problem: `${experts} experts are not divisible by ${shown(devices)} devices`,
    fix: 'pass a number of devices that divides n_routed_experts',
  })
}
