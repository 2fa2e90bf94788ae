/**
 * @file Load balancing: auxiliary-loss-free updates of the selection bias (V3 report 2.1.2), the small sequence-wise
 * loss that V3 adds (eq. 17-20), and the three losses of V2 (V2 report 2.2.3, eq. 23-31).
 *
 * Legend: B sequences, T time, N = B T tokens, E experts, K chosen, D devices.
 */
import {
  arange,
  checkOptions,
  full,
  MoeError,
  noGrad,
  type OptionNames,
  type Parameter,
  scatterAddRows,
  scope,
  type Tensor,
} from '@moe/core'

/** Options of an update of the selection bias. */
export interface BiasUpdateOptions {
  /**
   * Update speed γ, as a number or a scalar on the device. Default 0.001. V3: 0.001 for the first 14.3T tokens, then 0.
   */
  readonly speed?: number | Tensor | undefined
  /**
   * Subtracts the mean from the update, so that a common offset cannot drift (torchtitan's variant, not in the paper).
   * Default false.
   */
  readonly center?: boolean | undefined
}

export const biasUpdateNames: OptionNames<BiasUpdateOptions> = { speed: true, center: true }

/**
 * Performs one step of auxiliary-loss-free balancing: bias += γ sign(mean load - load). Call it once per optimizer step
 * with the loads `[E]` of the whole global batch (all micro-batches, all ranks).
 * @throws MoeError E_ATTR if `speed` is not finite
 */
export function updateBias(bias: Parameter, load: Tensor, options: BiasUpdateOptions = {}): void {
  checkOptions('updateBias', options, biasUpdateNames)
  const { speed = 0.001, center = false } = options
  if (speed === 0) return
  if (typeof speed === 'number' && !Number.isFinite(speed)) {
    const problem = `speed = ${speed} is not a finite number`
    throw new MoeError({ code: 'E_ATTR', op: 'updateBias', problem, fix: 'pass a finite number, such as 0.001 (V3)' })
  }
  const next = scope(() =>
    noGrad(() => {
      const loads = load.cast('f32')
      const direction = loads.mean().sub(loads).sign()
      const change = center ? direction.sub(direction.mean()) : direction
      return bias.add(change.mul(speed))
    }),
  )
  bias.assign(next)
}

/** The routing of a batch of B sequences of equal length. */
export interface RoutingPass {
  /** Unbiased affinities `[N, E]`, through which the losses send gradients. */
  readonly scores: Tensor
  /** Chosen experts `i32 [N, K]`. */
  readonly indices: Tensor
  /** B, the number of sequences. */
  readonly sequences: number
  /** `f32 [N]`: 1 for tokens and 0 for padding, which no count and no mean includes. Default: no padding. */
  readonly mask?: Tensor
}

/** Number of tokens per sequence that are not padding, as `[B, 1]` or a number common to all. At least 1. */
function tokensOf({ scores, sequences, mask }: RoutingPass): Tensor | number {
  const time = scores.shape[0] / sequences
  return mask ? mask.reshape([sequences, time]).sum(1, true).maximum(1) : Math.max(1, time)
}

/** f_i = E / (K T) #{t: i is chosen for t}, `[B, E]`, without gradient. 1 everywhere if balanced. */
function frequencies(pass: RoutingPass): Tensor {
  const { scores, indices, sequences, mask } = pass
  const [tokens, experts] = scores.shape
  const topK = indices.shape[1]
  const slots = (tokens / sequences) * topK
  const { backend } = scores
  return noGrad(() =>
    scope(() => {
      const first = arange(sequences, { backend }).mul(experts).reshape([sequences, 1])
      const cell = indices.reshape([sequences, slots]).add(first)
      const hits = mask
        ? mask
            .reshape([tokens, 1])
            .expand([tokens, topK])
            .mul(experts / topK)
            .reshape([sequences, slots])
        : full([sequences, slots], experts / topK, { backend })
      return scatterAddRows(cell, hits, sequences * experts)
        .reshape([sequences, experts])
        .div(tokensOf(pass))
    }),
  )
}

/** Mean of `values [N, E]` over the tokens of each sequence, `[B, E]`. */
function meanOverTime(values: Tensor, pass: RoutingPass): Tensor {
  const { sequences, mask } = pass
  const [tokens, features] = values.shape
  const counted = mask ? values.mul(mask.reshape([tokens, 1])) : values
  return counted
    .reshape([sequences, tokens / sequences, features])
    .sum(1)
    .div(tokensOf(pass))
}

/** Mean over sequences of sum_i f_i P_i. */
const product = (f: Tensor, p: Tensor): Tensor =>
  f
    .mul(p)
    .sum()
    .mul(1 / f.shape[0])

/**
 * Returns the sequence-wise balance loss without its factor α: the mean over sequences of sum_i f_i P_i, with f_i = E /
 * (K T) * #{t: i among the K best unbiased affinities of t} and P_i = mean_t s_i,t / sum_j s_j,t.
 *
 * `scores [B * T, E]` are the affinities of `sequences` = B rows of equal length; `mask [B * T]` is 0 for padding. The
 * loss is 1 if every sequence is perfectly balanced.
 */
export function sequenceBalanceLoss(scores: Tensor, sequences: number, topK: number, mask?: Tensor): Tensor {
  const indices = scores.detach().topk(topK).indices
  const pass = { scores, indices, sequences, mask }
  return product(frequencies(pass), meanOverTime(scores.div(scores.sum(-1, true).add(1e-20)), pass))
}

/**
 * Returns V2's expert-level loss without α1 (eq. 23-25): the mean over sequences of sum_i f_i P_i, with f_i for the
 * chosen experts and P_i = mean_t s_i,t.
 */
export function expertBalanceLoss(pass: RoutingPass): Tensor {
  return product(frequencies(pass), meanOverTime(pass.scores, pass))
}

/**
 * Returns V2's device-level loss without α2 (eq. 26-28). Each device has E / D consecutive experts; f' is the mean of
 * their f, and P' the sum of their P.
 */
export function deviceBalanceLoss(pass: RoutingPass, devices: number): Tensor {
  const byDevice = (x: Tensor) => x.reshape([pass.sequences, devices, x.shape[1] / devices])
  return product(byDevice(frequencies(pass)).mean(2), byDevice(meanOverTime(pass.scores, pass)).sum(2))
}

/**
 * Returns V2's communication loss without α3 (eq. 29-31): f''_d = D / (M T) * #{t is sent to device d}, and P'' as in
 * the device-level loss. M = `limit` is the number of devices that a token may be sent to (topk_group).
 */
export function communicationBalanceLoss(pass: RoutingPass, devices: number, limit: number): Tensor {
  const { scores, indices } = pass
  const [tokens, topK] = indices.shape
  const size = scores.shape[1] / devices
  const f_BD = noGrad(() =>
    scope(() => {
      const device_NK1 = indices.div(size).reshape([tokens, topK, 1])
      const sent_ND = device_NK1
        .eq(arange(devices, { backend: scores.backend }).reshape([1, 1, devices]))
        .cast('f32')
        .max(1)
      return meanOverTime(sent_ND, pass).mul(devices / limit)
    }),
  )
  const p_BD = meanOverTime(scores, pass).reshape([pass.sequences, devices, size]).sum(2)
  return product(f_BD, p_BD)
}
