/** @file Balance controllers: small objects, one per model, that an MoE layer asks for a loss and for a step of its bias. */
import { checkOptions, MoeError, type Parameter, shown, type Tensor } from '@moe/core'
import {
  communicationBalanceLoss,
  deviceBalanceLoss,
  expertBalanceLoss,
  type RoutingPass,
  sequenceBalanceLoss,
  updateBias,
} from './balance.ts'

/** A constant, or a function of the number of optimizer steps done. */
export type Scheduled = number | ((step: number) => number)

/** The value of a schedule at a step. @throws MoeError E_ATTR for one that is no number */
export function scheduled(value: Scheduled, step: number): number {
  const factor = typeof value === 'function' ? value(step) : value
  if (Number.isFinite(factor)) return factor
  throw new MoeError({
    code: 'E_ATTR',
    op: 'balance',
    problem: `the factor at step ${step} is ${shown(factor)}`,
    fix: 'pass a number, or a function of the step that gives one',
  })
}

/** Decides what keeps the experts of a layer evenly loaded. It holds no state, so one serves all layers. */
export interface Balancer {
  /** A scalar to add to the training loss, factor included; null for none. `step` counts the optimizer steps done. */
  loss?(pass: RoutingPass, step: number): Tensor | null
  /** Once per optimizer step: moves the selection bias by the loads `[E]` of the whole batch. */
  update?(bias: Parameter, load: Tensor, step: number): void
}

/** Refuses what is no balancer, such as a function that makes one. @throws MoeError E_CONFIG */
export function needBalancer(op: string, balancer: unknown): void {
  if (typeof balancer === 'object' && balancer !== null) return
  const problem = `the balancer is ${shown(balancer)}`
  throw new MoeError({ code: 'E_CONFIG', op, problem, fix: 'pass what a function such as auxFree() makes' })
}

/** Leaves the router to itself. */
export const noBalance = (): Balancer => ({})

/**
 * V3's auxiliary-loss-free balancing. γ, the `speed`, may follow a schedule (V3: 0.001, which is the default, and 0 for the last 3% of training).
 * `recentre`: see `BiasUpdateOptions`.
 */
export function auxFree(options: { speed?: Scheduled; recentre?: boolean } = {}): Balancer {
  checkOptions('auxFree', options, { speed: true, recentre: true })
  const { speed = 0.001, recentre } = options
  return { update: (bias, load, step) => updateBias(bias, load, { speed: scheduled(speed, step), recentre }) }
}

/** A loss whose factor may follow a schedule; nothing is computed while it is 0. */
function lossBalancer(alpha: Scheduled, loss: (pass: RoutingPass) => Tensor): Balancer {
  return {
    loss(pass, step) {
      const factor = scheduled(alpha, step)
      return factor === 0 ? null : loss(pass).mul(factor)
    },
  }
}

/** V3's sequence-wise loss, times `alpha` (default 1e-4, as there). */
export function sequenceWise(options: { alpha?: Scheduled } = {}): Balancer {
  checkOptions('sequenceWise', options, { alpha: true })
  return lossBalancer(options.alpha ?? 1e-4, ({ scores, sequences, indices, mask }) =>
    sequenceBalanceLoss(scores, sequences, indices.shape[1], mask),
  )
}

/** V2's expert-level loss, times `alpha` (default 0.003, as α1 there). */
export function expertLevel(options: { alpha?: Scheduled } = {}): Balancer {
  checkOptions('expertLevel', options, { alpha: true })
  return lossBalancer(options.alpha ?? 0.003, expertBalanceLoss)
}

/** V2's device-level loss, times `alpha` (default 0.05, as α2 there). The `devices` hold neighbouring experts, as the groups of the gate do. */
export function deviceLevel(options: { devices: number; alpha?: Scheduled }): Balancer {
  checkOptions('deviceLevel', options, { devices: true, alpha: true })
  return lossBalancer(options.alpha ?? 0.05, pass => deviceBalanceLoss(pass, devicesOf(pass, options.devices)))
}

/** V2's communication loss, times `alpha` (default 0.02, as α3 there). `limit`: of the `devices`, those that a token may be sent to. @throws MoeError E_ATTR */
export function communication(options: { devices: number; limit: number; alpha?: Scheduled }): Balancer {
  checkOptions('communication', options, { devices: true, limit: true, alpha: true })
  const { devices, limit, alpha = 0.02 } = options
  if (!Number.isInteger(limit) || limit < 1 || limit > devices) {
    const problem = `limit = ${limit} is not in 1..devices = ${devices}`
    const fix = 'pass the devices that a token may be sent to (topk_group)'
    throw new MoeError({ code: 'E_ATTR', op: 'communication', problem, fix })
  }
  return lossBalancer(alpha, pass => communicationBalanceLoss(pass, devicesOf(pass, devices), limit))
}

/** Several controllers as one: losses add up, biases are moved by each in turn. @throws MoeError E_CONFIG for what is no balancer */
export function together(...balancers: readonly Balancer[]): Balancer {
  for (const balancer of balancers) needBalancer('together', balancer)
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

/** Internal. The number of devices, checked. */
export function devicesOf({ scores }: Pick<RoutingPass, 'scores'>, devices: number): number {
  const [, experts] = scores.shape
  if (Number.isInteger(devices) && devices >= 1 && experts % devices === 0) return devices
  throw new MoeError({
    code: 'E_ATTR',
    op: 'balance',
    problem: `${devices} devices cannot share ${experts} experts evenly`,
    fix: 'pass a number of devices that divides n_routed_experts',
  })
}
