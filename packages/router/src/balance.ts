/**
 * @file Balancing: the bias that follows the load without touching gradients (V3 report 2.1.2, "auxiliary-loss-free"), and the small
 * sequence-wise loss beside it (eq. 17-20).
 */
import { arange, full, noGrad, type Parameter, scatterAddRows, scope, type Tensor } from '@moe/core'

export interface BiasUpdateOptions {
  /** Update speed γ. V3: 0.001 for the first 14.3T tokens, then 0. */
  readonly speed?: number
  /** Take the mean off the update, so that a common offset cannot drift (torchtitan's variant; not in the paper). Default false. */
  readonly recentre?: boolean
}

/**
 * One step of auxiliary-loss-free balancing: bias += γ sign(mean load - load). Call it once per optimizer step with the loads
 * `[E]` of the whole global batch (all micro-batches, all ranks).
 */
export function updateBias(bias: Parameter, load: Tensor, options: BiasUpdateOptions = {}): void {
  const { speed = 0.001, recentre = false } = options
  if (speed === 0) return
  const next = scope(() =>
    noGrad(() => {
      const loads = load.cast('f32')
      const direction = loads.mean().sub(loads).sign()
      const change = recentre ? direction.sub(direction.mean()) : direction
      return bias.add(change.mul(speed))
    }),
  )
  bias.assign(next)
}

/**
 * Sequence-wise balance loss without its factor α: mean over sequences of sum_i f_i P_i, with
 * f_i = E / (K T) * #{t: i among the K best unbiased affinities of t} and P_i = mean_t s_i,t / sum_j s_j,t.
 * `scores [B * T, E]` of `sequences` = B rows of equal length. 1 when every sequence is perfectly balanced.
 */
export function sequenceBalanceLoss(scores_NE: Tensor, sequences: number, topK: number): Tensor {
  const [tokens, experts] = scores_NE.shape
  const time = tokens / sequences
  const { backend } = scores_NE
  const f_BE = noGrad(() =>
    scope(() => {
      const chosen = scores_NE
        .detach()
        .topk(topK)
        .indices.reshape([sequences, time * topK])
      const cell = chosen.add(arange(sequences, { backend }).mul(experts).reshape([sequences, 1]))
      const hits = full([sequences, time * topK], experts / (topK * time), { backend })
      return scatterAddRows(cell, hits, sequences * experts).reshape([sequences, experts])
    }),
  )
  const share_NE = scores_NE.div(scores_NE.sum(-1, true).add(1e-20))
  const p_BE = share_NE.reshape([sequences, time, experts]).mean(1)
  return f_BE
    .mul(p_BE)
    .sum()
    .mul(1 / sequences)
}
