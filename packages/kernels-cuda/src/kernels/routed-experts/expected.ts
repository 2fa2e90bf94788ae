/**
 * @file For tests: what routedExperts gives, and its gradients, in f64: by loops, with how far rounding to bf16 between the products can move each; and in precision fp8
 * with all roundings.
 */
import {
  backward,
  combineTokens,
  dispatchPlan,
  groupedMatmul,
  ones,
  Parameter,
  permuteTokens,
  scope,
  swiglu,
  type Tensor,
  tensor,
  withPrecision,
  zeros,
} from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'

/** N tokens, K choices each, E experts, D features, I inner ones. */
export interface Sizes {
  readonly N: number
  readonly K: number
  readonly E: number
  readonly D: number
  readonly I: number
}

export interface Numbers extends Sizes {
  readonly x: Float32Array
  readonly gate: Float32Array
  readonly up: Float32Array
  readonly down: Float32Array
  readonly weights: Float32Array
  /** Expert of each slot; E: none. */
  readonly chosen: Int32Array
  readonly dout: Float32Array
}

/** Values with bounds of their errors. */
export interface Bounded {
  readonly values: Float64Array
  readonly bounds: Float64Array
}
export type Results = Record<'out' | 'dx' | 'dgate' | 'dup' | 'ddown' | 'dweights', Bounded>

/** Most that rounding to bf16 takes of a number. */
const unit = 2 ** -8
/** Largest slopes of silu and of its slope. */
const [slope, bend] = [1.1, 0.5]

/** A sum of `size` products, with what errors of the left factors make of it. */
function dot(size: number, left: (i: number) => number, error: (i: number) => number, right: (i: number) => number) {
  let value = 0
  let bound = 0
  for (let i = 0; i < size; i++) {
    value += left(i) * right(i)
    bound += error(i) * Math.abs(right(i))
  }
  return [value, bound]
}

/**
 * Operands count as exact: they hold numbers of bf16. Rounded are gate's and up's results, SwiGLU's, the experts' output, dinner, dgate, dup, the weighted inner rows
 * and rows of dx; errors of SwiGLU propagate with the slope of silu. Second-order errors and those of f32 sums must be covered by the margin of the caller.
 */
export function expectedOf({ N, K, E, D, I, x, gate, up, down, weights, chosen, dout }: Numbers): Results {
  const make = (size: number) => ({ values: new Float64Array(size), bounds: new Float64Array(size) })
  const results = {
    out: make(N * D),
    dx: make(N * D),
    dgate: make(E * I * D),
    dup: make(E * I * D),
    ddown: make(E * D * I),
    dweights: make(N * K),
  }
  const { abs } = Math
  const add = (to: Bounded, at: number, value: number, bound: number) => {
    to.values[at] += value
    to.bounds[at] += bound
  }
  const row = () => make(I)
  for (let slot = 0; slot < N * K; slot++) {
    const n = Math.floor(slot / K)
    const expert = chosen[slot]
    if (expert === E) continue
    const weight = weights[slot]
    const [inner, dg, du] = [row(), row(), row()]
    for (let i = 0; i < I; i++) {
      const at = (expert * I + i) * D
      const exact = () => 0
      const [g] = dot(
        D,
        d => x[n * D + d],
        exact,
        d => gate[at + d],
      )
      const [u] = dot(
        D,
        d => x[n * D + d],
        exact,
        d => up[at + d],
      )
      const [dinner] = dot(
        D,
        d => dout[n * D + d],
        exact,
        d => down[(expert * D + d) * I + i],
      )
      const s = 1 / (1 + Math.exp(-g))
      const [silu, slopeHere] = [g * s, s * (1 + g * (1 - s))]
      inner.values[i] = silu * u
      inner.bounds[i] = (slope * abs(g * u) + abs(silu * u)) * unit
      dg.values[i] = weight * dinner * u * slopeHere
      dg.bounds[i] = (3 * abs(dg.values[i]) + abs(weight * dinner * u * g) * bend) * unit
      du.values[i] = weight * dinner * silu
      du.bounds[i] = (2 * abs(du.values[i]) + abs(weight * dinner * g) * slope) * unit
      add(
        results.dweights,
        slot,
        dinner * inner.values[i],
        abs(dinner) * (inner.bounds[i] + abs(inner.values[i]) * unit),
      )
      for (let d = 0; d < D; d++) {
        add(results.dgate, at + d, dg.values[i] * x[n * D + d], dg.bounds[i] * abs(x[n * D + d]))
        add(results.dup, at + d, du.values[i] * x[n * D + d], du.bounds[i] * abs(x[n * D + d]))
        const weighted = weight * inner.values[i]
        const error = abs(weight) * inner.bounds[i] + abs(weighted) * unit
        add(results.ddown, (expert * D + d) * I + i, weighted * dout[n * D + d], error * abs(dout[n * D + d]))
      }
    }
    for (let d = 0; d < D; d++) {
      const rounded = (i: number) => inner.bounds[i] + abs(inner.values[i]) * unit
      const [y, yBound] = dot(
        I,
        i => inner.values[i],
        rounded,
        i => down[(expert * D + d) * I + i],
      )
      add(results.out, n * D + d, weight * y, abs(weight) * (yBound + abs(y) * unit))
      const at = (i: number) => (expert * I + i) * D + d
      const [a, aBound] = dot(
        I,
        i => dg.values[i],
        i => dg.bounds[i],
        i => gate[at(i)],
      )
      const [b, bBound] = dot(
        I,
        i => du.values[i],
        i => du.bounds[i],
        i => up[at(i)],
      )
      add(results.dx, n * D + d, a + b, aBound + bBound + abs(a + b) * unit)
    }
  }
  return results
}

/** What products of rows give: rounded to bf16, or as it is, which is what the ops one by one do. */
type Rounding = 'bf16' | 'f32'

/** In precision fp8: operands are rounded to fp8 by the reference. Gradients of weights and of SwiGLU are core's. */
export function fp8ResultsOf(numbers: Numbers, rounding: Rounding): Record<keyof Results, Float64Array> {
  const { N, K, E, D, I } = numbers
  const backend = referenceBackend()
  const of = (name: 'x' | 'gate' | 'up' | 'down' | 'weights' | 'dout', ...shape: number[]) =>
    tensor(numbers[name], shape, { backend })
  const inFp8 = () => {
    const [x, dout, weights] = [of('x', N, D), of('dout', N, D), of('weights', N, K)]
    const [gate, up, down] = [of('gate', E, I, D), of('up', E, I, D), of('down', E, D, I)]
    const plan = dispatchPlan(tensor(numbers.chosen, [N, K], { backend }), E + 1)
    const offsets = plan.offsets.narrow(0, 0, E + 1)
    const result = (rows: Tensor) => (rounding === 'bf16' ? rows.cast('bf16').cast('f32') : rows)
    const forward = (rows: Tensor, weight: Tensor) => groupedMatmul(rows, weight, offsets)
    const back = (rows: Tensor, weight: Tensor) => forward(rows, weight.permute([0, 2, 1]))
    const gradientOf = (rows: Tensor, like: Tensor, dy: Tensor) => {
      const weight = new Parameter(zeros(like.shape, { backend }))
      backward(forward(rows, weight), { gradient: dy })
      return weight.grad as Tensor
    }
    const rows = permuteTokens(x, plan)
    const [gateRows, upRows] = [gate, up].map(weight => new Parameter(result(forward(rows, weight))))
    const inner = swiglu(gateRows, upRows)
    const y = result(forward(inner.detach(), down))
    const doutRows = permuteTokens(dout, plan)
    const dinner = result(back(doutRows, down))
    const weightRows = weights.reshape([N * K, 1]).takeRows(plan.order)
    backward(inner, { gradient: dinner.mul(weightRows) })
    const [dgateRows, dupRows] = [gateRows, upRows].map(({ grad }) => grad as Tensor)
    const dx = result(back(dgateRows, gate).add(back(dupRows, up)))
    return {
      out: combineTokens(y, weights, plan),
      dx: combineTokens(dx, ones([N, K], { backend }), plan),
      dgate: gradientOf(rows, gate, dgateRows),
      dup: gradientOf(rows, up, dupRows),
      ddown: gradientOf(inner.detach().mul(weightRows), down, doutRows),
      dweights: dinner.mul(inner.detach()).sum(1).takeRows(plan.positions),
    }
  }
  return scope(() => {
    const found = Object.entries(withPrecision('fp8', inFp8)).map(([name, value]) => [name, readF64(value)])
    return Object.fromEntries(found) as Record<keyof Results, Float64Array>
  })
}
