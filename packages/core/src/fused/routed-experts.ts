/**
 * @file The routed experts of a layer as one op, so that a kernel can choose in which dtype the results of products are
 * stored. N tokens, K choices each, M = N K rows in expert order, E experts, D features, I intermediate features.
 */
import { withKept, withRecomputed } from '../autograd/checkpoint.ts'
import { needDtype, needShape } from '../checks.ts'
import type { Precision } from '../ops.ts'
import { checkOptions } from '../options.ts'
import { currentPrecision } from '../precision.ts'
import { scope } from '../scope.ts'
import { isRecording } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'
import {
  combineTokensDefinition,
  type DispatchPlan,
  permuteTokensBackwardDefinition,
  permuteTokensDefinition,
} from './dispatch.ts'
import { groupedMatmulDefinition, groupedMatmulWeightGradDefinition } from './grouped-matmul.ts'
import { swigluBackwardDefinition, swigluDefinition } from './swiglu.ts'

export const routedExpertsDefinition: FusedDefinition<'routedExperts'> = {
  name: 'routedExperts',
  infer([x, gate, up, down, weights, order, positions, offsets], { precision, saves }) {
    for (const [name, value] of Object.entries({ input: x, gate, up, down, weights })) {
      needDtype('routedExperts', name, value, 'f32')
    }
    needShape('routedExperts', 'input', x, [-1, -1])
    const [tokens, features] = x.shape
    needShape('routedExperts', 'gate', gate, [-1, -1, features])
    const [experts, inner] = gate.shape
    needShape('routedExperts', 'up', up, gate.shape)
    needShape('routedExperts', 'down', down, [experts, features, inner])
    needShape('routedExperts', 'weights', weights, [tokens, -1])
    for (const [name, value] of Object.entries({ order, positions, offsets })) {
      needDtype('routedExperts', name, value, 'i32')
      needShape('routedExperts', name, value, [name === 'offsets' ? experts + 1 : weights.size])
    }
    const saved = { shape: [weights.size, inner], dtype: precision === 'f32' ? 'f32' : 'bf16' } as const
    return [{ shape: x.shape, dtype: 'f32' }, ...(saves ? [saved, saved] : [])]
  },
  decompose: (inputs, { precision }) => compose(inputs, precision, withKept),
  vjp({ inputs, outputs: [, ...saved], attrs: { precision }, needs }, [dout]) {
    const none = inputs.map(() => null)
    if (dout === null) return none
    if (saved.length === 0) throw new Error('routedExperts saved nothing for its gradient')
    const needed = none.slice(0, 5).map((_, i) => needs(i))
    const found = runFused(routedExpertsBackwardDefinition, [...inputs, ...saved, dout], { precision, needs: needed })
    let next = 0
    return none.map((_, i) => (needed[i] ? found[next++] : null))
  },
}

/** @param through how cheap intermediate results are passed to the products that read them: kept or recomputed */
function compose(inputs: readonly Tensor[], precision: Precision, through: typeof withRecomputed): Tensor[] {
  const [x, gate, up, down, weights, order, positions, offsets] = inputs
  const product = (a: Tensor, weight: Tensor) =>
    runFused(groupedMatmulDefinition, [a, weight, offsets], { transposeW: true, precision })[0]
  const attrs = { topK: weights.shape[1] }
  const [gate_MI, up_MI] = through(
    tokens => [runFused(permuteTokensDefinition, [tokens, order, positions], attrs)[0]],
    rows_MD => [product(rows_MD, gate), product(rows_MD, up)] as const,
    x,
  )
  const out_MD = through(
    (...of) => [runFused(swigluDefinition, of, {})[0]],
    inner_MI => product(inner_MI, down),
    gate_MI,
    up_MI,
  )
  return runFused(combineTokensDefinition, [out_MD, weights, order, positions], {})
}

export const routedExpertsBackwardDefinition: FusedDefinition<'routedExpertsBackward'> = {
  name: 'routedExpertsBackward',
  infer: (inputs, { needs }) =>
    needs.flatMap((isNeeded, i) => (isNeeded ? [{ shape: inputs[i].shape, dtype: 'f32' }] : [])),
  decompose(inputs, { precision, needs }) {
    const [x, gate, up, down, weights, order, positions, offsets, gateSaved, upSaved, dout] = inputs
    const [topK, rows] = [weights.shape[1], weights.size]
    const toExperts = (of: Tensor) => runFused(permuteTokensDefinition, [of, order, positions], { topK })[0]
    const back = (dy: Tensor, weight: Tensor) =>
      runFused(groupedMatmulDefinition, [dy, weight, offsets], { transposeW: false, precision })[0]
    const weightGradient = (of: Tensor, dy: Tensor) =>
      runFused(groupedMatmulWeightGradDefinition, [of, dy, offsets], { precision })[0]
    const [gate_MI, up_MI] = [gateSaved.cast('f32'), upSaved.cast('f32')]
    const [inner_MI] = runFused(swigluDefinition, [gate_MI, up_MI], {})
    const dout_MD = toExperts(dout)
    // As if every choice had weight 1.
    const dinner_MI = back(dout_MD, down)
    const weights_M1 = weights.reshape([rows, 1]).takeRows(order)
    const [dgate_MI, dup_MI] = runFused(swigluBackwardDefinition, [gate_MI, up_MI, dinner_MI.mul(weights_M1)], {})
    const gradients = [
      () => {
        const dx_MD = back(dgate_MI, gate).add(back(dup_MI, up))
        return runFused(permuteTokensBackwardDefinition, [dx_MD, positions], { topK })[0]
      },
      () => weightGradient(toExperts(x), dgate_MI),
      () => weightGradient(toExperts(x), dup_MI),
      () => weightGradient(inner_MI.mul(weights_M1), dout_MD),
      () => dinner_MI.mul(inner_MI).sum(1).takeRows(positions).reshape(weights.shape),
    ]
    return gradients.filter((_, i) => needs[i]).map(gradient => gradient())
  },
  vjp: null,
}

/** The weights of E networks down(silu(gate(x)) * up(x)). */
export interface ExpertWeights {
  /** `[E, I, D]`. */
  readonly gate: Tensor
  /** `[E, I, D]`. */
  readonly up: Tensor
  /** `[E, D, I]`. */
  readonly down: Tensor
}

/**
 * Runs the experts that the plan chose on the tokens `x [N, D]`, and returns the sum of their outputs, weighted by
 * `weights [N, K]`: `[N, D]`.
 *
 * Equals permuteTokens, groupedMatmul by gate and up, swiglu, groupedMatmul by down, and combineTokens. In f32 it runs
 * exactly these ops; in bf16 and fp8, a backend may store results of products in bf16.
 * @param options.recompute recomputes the results of permuteTokens and swiglu in the backward pass; a backend with its
 * own kernel always does. Default false
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function routedExperts(
  x: Tensor,
  experts: ExpertWeights,
  weights: Tensor,
  plan: DispatchPlan,
  options: { recompute?: boolean } = {},
): Tensor {
  checkOptions('routedExperts', options, { recompute: true })
  const precision = currentPrecision()
  const { gate, up, down } = experts
  const inputs = [x, gate, up, down, weights, plan.order, plan.positions, plan.offsets]
  const saves = isRecording() && inputs.some(input => input.tracked)
  const attrs = { precision, saves }
  if (precision !== 'f32' && x.backend.fused.routedExperts !== undefined) {
    return runFused(routedExpertsDefinition, inputs, attrs)[0]
  }
  // A kernel would gain nothing here, so this does not count as a fallback.
  routedExpertsDefinition.infer(inputs, attrs)
  const run = () => compose(inputs, precision, options.recompute ? withRecomputed : withKept)[0]
  return saves ? run() : scope(run)
}
