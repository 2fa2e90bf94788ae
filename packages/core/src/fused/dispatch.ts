/**
 * @file Moves tokens to their experts and back, without dropping any and without reading anything back to the host. N
 * tokens, K choices each, E experts, D features.
 */
import { attrError, needDtype, needShape, shapeError } from '../checks.ts'
import { arange, full } from '../create.ts'
import { concat, setRows } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const dispatchPlanDefinition: FusedDefinition<'dispatchPlan'> = {
  name: 'dispatchPlan',
  infer([indices], { experts }) {
    needDtype('dispatchPlan', 'indices', indices, 'i32')
    needShape('dispatchPlan', 'indices', indices, [-1, -1], 'pass indices [N, K]: K experts for each token')
    if (!Number.isInteger(experts) || experts < 1) {
      throw attrError('dispatchPlan', `experts = ${experts} is not a positive integer`, 'pass the number of experts')
    }
    const slots = indices.size
    return [
      { shape: [slots], dtype: 'i32' },
      { shape: [slots], dtype: 'i32' },
      { shape: [experts + 1], dtype: 'i32' },
      { shape: [experts], dtype: 'i32' },
    ]
  },
  decompose([indices], { experts }) {
    const slots = indices.size
    const flat = indices.reshape([slots, 1])
    const hit_SE = flat.eq(arange(experts, indices).reshape([1, experts])).cast('i32')
    const counts = hit_SE.sum(0)
    const offsets = concat([full([1], 0, indices), counts.cumsum(0)])
    // The position of a slot is the start of its expert plus its rank among the slots of that expert, in slot order.
    const rank = hit_SE.mul(hit_SE.cumsum(0)).sum(1).sub(1)
    const positions = offsets.takeRows(indices.reshape([slots])).add(rank)
    const order = setRows(full([slots], 0, indices), positions, arange(slots, indices))
    return [order, positions, offsets, counts]
  },
  vjp: null,
}

export const permuteTokensDefinition: FusedDefinition<'permuteTokens'> = {
  name: 'permuteTokens',
  infer([x, order, positions], { topK }) {
    needDtype('permuteTokens', 'input', x, 'f32')
    needShape('permuteTokens', 'input', x, [-1, -1])
    for (const [name, value] of Object.entries({ order, positions })) {
      needDtype('permuteTokens', name, value, 'i32')
      needShape('permuteTokens', name, value, [x.shape[0] * topK])
    }
    return [{ shape: [order.shape[0], x.shape[1]], dtype: 'f32' }]
  },
  decompose: ([x, order], { topK }) => [x.takeRows(order.div(topK))],
  vjp: ({ inputs: [, , positions], attrs }, [dy]) => [
    dy === null ? null : runFused(permuteTokensBackwardDefinition, [dy, positions], attrs)[0],
    null,
    null,
  ],
}

export const permuteTokensBackwardDefinition: FusedDefinition<'permuteTokensBackward'> = {
  name: 'permuteTokensBackward',
  infer: ([dy], { topK }) => [{ shape: [dy.shape[0] / topK, dy.shape[1]], dtype: 'f32' }],
  decompose: ([dy, positions], { topK }) => [
    dy
      .takeRows(positions)
      .reshape([dy.shape[0] / topK, topK, dy.shape[1]])
      .sum(1),
  ],
  vjp: null,
}

export const combineTokensDefinition: FusedDefinition<'combineTokens'> = {
  name: 'combineTokens',
  infer([y, weights, order, positions]) {
    for (const [name, value] of Object.entries({ input: y, weights })) needDtype('combineTokens', name, value, 'f32')
    needShape('combineTokens', 'weights', weights, [-1, -1])
    needShape('combineTokens', 'input', y, [weights.size, -1])
    for (const [name, value] of Object.entries({ order, positions })) {
      needDtype('combineTokens', name, value, 'i32')
      needShape('combineTokens', name, value, [weights.size])
    }
    return [{ shape: [weights.shape[0], y.shape[1]], dtype: 'f32' }]
  },
  decompose([y, weights, , positions]) {
    const [tokens, topK] = weights.shape
    const gathered = y.takeRows(positions).reshape([tokens, topK, y.shape[1]])
    return [gathered.mul(weights.reshape([tokens, topK, 1])).sum(1)]
  },
  vjp: ({ inputs: [y, weights, order, positions] }, [dout]) =>
    dout === null
      ? [null, null, null, null]
      : [...runFused(combineTokensBackwardDefinition, [y, weights, order, positions, dout], {}), null, null],
}

export const combineTokensBackwardDefinition: FusedDefinition<'combineTokensBackward'> = {
  name: 'combineTokensBackward',
  infer: ([y, weights]) => [y, weights],
  decompose([y, weights, order, positions, dout]) {
    const [tokens, topK] = weights.shape
    const features = y.shape[1]
    const gate = weights.reshape([tokens * topK, 1]).takeRows(order)
    const dy = dout.takeRows(order.div(topK)).mul(gate)
    const gathered = y.takeRows(positions).reshape([tokens, topK, features])
    return [dy, gathered.mul(dout.reshape([tokens, 1, features])).sum(2)]
  },
  vjp: null,
}

/** Where each choice of each token goes, as data on the device. Slot s = token * K + choice. */
export interface DispatchPlan {
  /** K, the number of choices per token. */
  readonly topK: number
  /** `i32 [N*K]`: the slot at each sorted position, by expert, then by slot. */
  readonly order: Tensor
  /** `i32 [N*K]`: the sorted position of each slot. */
  readonly positions: Tensor
  /** `i32 [E+1]`: the first sorted position of each expert. */
  readonly offsets: Tensor
  /** `i32 [E]`: the number of slots of each expert, its load. */
  readonly counts: Tensor
}

/** Sorts the choices `i32 [N, K]` by expert, stably. No token is dropped. @throws MoeError E_SHAPE, E_DTYPE, E_ATTR */
export function dispatchPlan(indices: Tensor, experts: number): DispatchPlan {
  if (indices.rank !== 2) throw shapeError('dispatchPlan', `indices have rank ${indices.rank}, expected [tokens, topK]`)
  const [order, positions, offsets, counts] = runFused(dispatchPlanDefinition, [indices], { experts })
  return { topK: indices.shape[1], order, positions, offsets, counts }
}

/** Copies the tokens `x [N, D]` into expert order: `[N*K, D]`. */
export function permuteTokens(x: Tensor, plan: DispatchPlan): Tensor {
  return runFused(permuteTokensDefinition, [x, plan.order, plan.positions], { topK: plan.topK })[0]
}

/**
 * Returns the sum of the experts' outputs `y [N*K, D]` for each token, weighted by the gates `weights [N, K]`: `[N,
 * D]`.
 */
export function combineTokens(y: Tensor, weights: Tensor, plan: DispatchPlan): Tensor {
  return runFused(combineTokensDefinition, [y, weights, plan.order, plan.positions], {})[0]
}
