/**
 * @file Device-level token dropping (V2 report 2.2.4): in training, each device has a budget of its average share, and
 * drops the choices with the lowest affinity beyond it.
 *
 * Legend: B sequences, T time, N = B T tokens, E experts, K chosen, D devices, S = N K choices.
 */
import {
  arange,
  checkOptions,
  full,
  MoeError,
  noGrad,
  type OptionNames,
  scatterAddRows,
  scope,
  shown,
  type Tensor,
  where,
} from '@moe/core'
import type { RoutingPass } from './balance.ts'
import { dividing } from './balancer.ts'

/** Options of V2's token dropping. */
export interface TokenDropping {
  /** Number of devices that share the experts; each has consecutive experts. */
  readonly devices: number
  /** Budget of a device, relative to the mean over devices. Default 1, as in V2. */
  readonly capacity_factor?: number
}

const droppingNames: OptionNames<TokenDropping> = { devices: true, capacity_factor: true }

/** Checks the options for a layer of `experts` experts. @throws MoeError E_CONFIG, E_ATTR */
export function checkDropping(op: string, dropping: TokenDropping, experts: number): void {
  checkOptions(op, dropping, droppingNames)
  dividing(experts, dropping.devices)
  const { capacity_factor: factor = 1 } = dropping
  if (typeof factor === 'number' && factor > 0) return
  const problem = `capacity_factor = ${shown(factor)} is not a positive number`
  throw new MoeError({ code: 'E_ATTR', op, problem, fix: 'pass 1 (V2), or leave it out' })
}

/** A routing pass, and the sequences in it that are never dropped. */
export interface DroppingPass extends RoutingPass {
  /**
   * `f32 [B]`: 1 for sequences whose tokens are never dropped. Their choices use the budget first, and may exceed it.
   * Default: none.
   */
  readonly undropped?: Tensor
}

/**
 * Returns which choices `f32 [N, K]` are kept, as 1 or 0. Each device keeps those of highest affinity until its budget,
 * ceil(factor * choices / devices), is used up; equal affinities are kept in the order of tokens. Padding is never
 * kept, and does not count for the budget.
 * @throws MoeError E_ATTR if the devices cannot share the experts evenly, or the factor is not a positive number
 */
export function withinDeviceBudget(pass: DroppingPass, dropping: TokenDropping): Tensor {
  const { scores, indices, sequences, mask, undropped } = pass
  const { devices, capacity_factor: factor = 1 } = dropping
  const [tokens, experts] = scores.shape
  checkDropping('withinDeviceBudget', dropping, experts)
  const topK = indices.shape[1]
  const slots = tokens * topK
  const { backend } = scores
  const perSlot = (perToken: Tensor) => perToken.reshape([tokens, 1]).expand([tokens, topK]).reshape([slots])
  return noGrad(() =>
    scope(() => {
      const rowStart = arange(tokens, { backend }).mul(experts).reshape([tokens, 1])
      const affinity = scores
        .reshape([tokens * experts])
        .takeRows(indices.add(rowStart))
        .reshape([slots])
      const undroppedSlots = undropped
        ? perSlot(undropped.reshape([sequences, 1]).expand([sequences, tokens / sequences]))
        : full([slots], 0, { backend })
      const real = mask ? perSlot(mask) : full([slots], 1, { backend })
      // Affinities are at most 1, so 2 comes before all of them. -1 marks choices of other devices.
      const priority = where(undroppedSlots.lt(0.5), affinity, full([], 2, { backend }))
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
      const withinBudget = arange(most, { backend }).cast('f32').lt(budget).cast('f32').reshape([1, most])
      const chosen = full([], 0, { backend }).le(best.values).cast('f32').mul(withinBudget)
      const kept = scatterAddRows(best.indices.reshape([devices * most]), chosen.reshape([devices * most]), slots)
      return kept.maximum(undroppedSlots.mul(real)).reshape([tokens, topK])
    }),
  )
}
