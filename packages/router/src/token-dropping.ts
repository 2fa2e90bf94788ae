/**
 * @file Device-level token dropping (V2 report 2.2.4): in training each device works off its average share, and drops what it likes least beyond it.
 *
 * Legend: B sequences, T time, N = B T tokens, E experts, K chosen, D devices, S = N K choices.
 */
import {
  arange,
  checkOptions,
  full,
  noGrad,
  type OptionNames,
  scatterAddRows,
  scope,
  type Tensor,
  where,
} from '@moe/core'
import type { RoutingPass } from './balance.ts'
import { devicesOf } from './balancer.ts'

/** V2's token dropping: devices, and how much of the load each takes. */
export interface TokenDropping {
  /** Devices that share the experts, neighbouring ones on the same. */
  readonly devices: number
  /** Choices that a device takes are this times the mean over devices. Default 1, as V2. */
  readonly capacity_factor?: number
}

export const droppingNames: OptionNames<TokenDropping> = { devices: true, capacity_factor: true }

/** A pass, and the sequences of it that lose nothing. */
export interface DroppingPass extends RoutingPass {
  /** `f32 [B]`, 1 for sequences that lose no token. Their choices take room before all others, and beyond it. Default: none. */
  readonly undropped?: Tensor
}

/**
 * Which choices `f32 [N, K]` are kept: 1 or 0. Each device keeps those of highest affinity until its budget is used up, ceil(factor * choices / devices);
 * equal affinities go in the order of tokens. Padding is kept nowhere and is no part of the budget.
 */
export function withinDeviceBudget(pass: DroppingPass, dropping: TokenDropping): Tensor {
  checkOptions('withinDeviceBudget', dropping, droppingNames)
  const { scores, indices, sequences, mask, undropped } = pass
  const { capacity_factor: factor = 1 } = dropping
  const devices = devicesOf(pass, dropping.devices)
  const [tokens, experts] = scores.shape
  const topK = indices.shape[1]
  const slots = tokens * topK
  const { backend } = scores
  const perSlot = (perToken: Tensor) => perToken.reshape([tokens, 1]).expand([tokens, topK]).reshape([slots])
  return noGrad(() =>
    scope(() => {
      const number = arange(tokens, { backend }).mul(experts).reshape([tokens, 1])
      const affinity = scores
        .reshape([tokens * experts])
        .takeRows(indices.add(number))
        .reshape([slots])
      const spared = undropped
        ? perSlot(undropped.reshape([sequences, 1]).expand([sequences, tokens / sequences]))
        : full([slots], 0, { backend })
      const real = mask ? perSlot(mask) : full([slots], 1, { backend })
      // Affinities are at most 1: 2 stands before all of them, -1 is no choice of this device.
      const priority = where(spared.lt(0.5), affinity, full([], 2, { backend }))
      const device = where(
        real.lt(0.5),
        full([], -1, { backend, dtype: 'i32' }),
        indices.reshape([slots]).div(experts / devices),
      )
      const here = device.reshape([1, slots]).eq(arange(devices, { backend }).reshape([devices, 1]))
      const byDevice = where(here, priority.reshape([1, slots]), full([], -1, { backend }))
      const most = Math.min(slots, Math.ceil((factor * slots) / devices))
      const best = byDevice.topk(most)
      const budget = real.sum().mul(-factor).div(devices).floor().neg()
      const inTime = arange(most, { backend }).cast('f32').lt(budget).cast('f32').reshape([1, most])
      const chosen = full([], 0, { backend }).le(best.values).cast('f32').mul(inTime)
      const kept = scatterAddRows(best.indices.reshape([devices * most]), chosen.reshape([devices * most]), slots)
      return kept.maximum(spared.mul(real)).reshape([tokens, topK])
    }),
  )
}
