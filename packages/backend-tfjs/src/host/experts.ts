/** @file Permutes tokens to their experts, multiplies them there, and combines the results. N tokens, K choices, E experts, D features. */
import { type FusedAttrs, sizeOf, type TensorSpec, type Value } from '@moe/core'
import { planSlots } from '../dispatch-plan.ts'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { viewProduct } from './matmul.ts'
import { f32Of, type Host, i32Of } from './memory.ts'
import { copyRow } from './rows.ts'

const f32View = (host: Host, tensor: TfTensor): Float32Array => host.view(tensor) as Float32Array

export function dispatchPlan(
  host: Host,
  [indices]: readonly Value[],
  { experts }: FusedAttrs['dispatchPlan'],
  specs: readonly TensorSpec[],
) {
  const plan = planSlots(i32Of(host, indices), experts)
  const outputs = specs.map(({ shape }) => host.output(shape, 'int32'))
  const parts = [plan.order, plan.positions, plan.offsets, plan.counts]
  outputs.forEach((tensor, i) => {
    host.view(tensor).set(parts[i])
  })
  return outputs
}

export function permuteTokens(
  host: Host,
  [x, order]: readonly Value[],
  { topK }: FusedAttrs['permuteTokens'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  const [to, from, slots] = [f32View(host, out), f32Of(host, x), i32Of(host, order)]
  const size = x.shape[1]
  for (let p = 0; p < slots.length; p++) copyRow(from, Math.floor(slots[p] / topK) * size, to, p * size, size)
  return [out]
}

export function permuteTokensBackward(
  host: Host,
  [dy, positions]: readonly Value[],
  { topK }: FusedAttrs['permuteTokensBackward'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  const [to, from, at] = [f32View(host, out).fill(0), f32Of(host, dy), i32Of(host, positions)]
  const size = dy.shape[1]
  for (let s = 0; s < at.length; s++) {
    const target = Math.floor(s / topK) * size
    const source = at[s] * size
    for (let j = 0; j < size; j++) to[target + j] += from[source + j]
  }
  return [out]
}

export function combineTokens(
  host: Host,
  [y, weights, , positions]: readonly Value[],
  _: FusedAttrs['combineTokens'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  const to = f32View(host, out).fill(0)
  const [from, gate, at] = [f32Of(host, y), f32Of(host, weights), i32Of(host, positions)]
  const [topK, size] = [weights.shape[1], y.shape[1]]
  for (let s = 0; s < at.length; s++) {
    const target = Math.floor(s / topK) * size
    const source = at[s] * size
    for (let j = 0; j < size; j++) to[target + j] += gate[s] * from[source + j]
  }
  return [out]
}

export function combineTokensBackward(
  host: Host,
  [y, weights, , positions, dout]: readonly Value[],
  _: FusedAttrs['combineTokensBackward'],
  specs: readonly TensorSpec[],
) {
  const [dy, dWeights] = specs.map(({ shape }) => host.output(shape, 'float32'))
  const [dFrom, dGate] = [f32View(host, dy), f32View(host, dWeights)]
  const [from, gate, at, g] = [f32Of(host, y), f32Of(host, weights), i32Of(host, positions), f32Of(host, dout)]
  const [topK, size] = [weights.shape[1], y.shape[1]]
  for (let s = 0; s < at.length; s++) {
    const token = Math.floor(s / topK) * size
    const row = at[s] * size
    let sum = 0
    for (let j = 0; j < size; j++) {
      dFrom[row + j] = gate[s] * g[token + j]
      sum += from[row + j] * g[token + j]
    }
    dGate[s] = sum
  }
  return [dy, dWeights]
}

/** Row range of every expert, limited to existing rows. */
function* ranges(offsets: Int32Array, rows: number): Generator<[expert: number, start: number, end: number]> {
  for (let e = 0; e + 1 < offsets.length; e++) {
    const start = Math.max(0, Math.min(rows, offsets[e]))
    yield [e, start, Math.max(start, Math.min(rows, offsets[e + 1]))]
  }
}

export function groupedMatmul(
  host: Host,
  [x, weight, offsets]: readonly Value[],
  { transposeW }: FusedAttrs['groupedMatmul'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  f32View(host, out).fill(0)
  const [rows, n] = spec.shape
  const k = x.shape[1]
  const [row, column] = transposeW ? [1, k] : [n, 1]
  for (const [e, start, end] of ranges(i32Of(host, offsets).slice(), rows)) {
    if (start === end || n === 0 || k === 0) continue
    const product = viewProduct(
      host,
      { tensor: tensorOf(x), start: start * k, row: k, column: 1, rows: end - start, columns: k },
      { tensor: tensorOf(weight), start: e * n * k, row, column, rows: k, columns: n },
    )
    f32View(host, out).set(f32View(host, product), start * n)
    product.dispose()
  }
  return [out]
}

export function groupedMatmulWeightGrad(
  host: Host,
  [x, dy, offsets]: readonly Value[],
  _: FusedAttrs['groupedMatmulWeightGrad'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, 'float32')
  f32View(host, out).fill(0)
  const [, n, k] = spec.shape
  for (const [e, start, end] of ranges(i32Of(host, offsets).slice(), x.shape[0])) {
    if (start === end || sizeOf(spec.shape) === 0) continue
    const product = viewProduct(
      host,
      { tensor: tensorOf(dy), start: start * n, row: 1, column: n, rows: n, columns: end - start },
      { tensor: tensorOf(x), start: start * k, row: k, column: 1, rows: end - start, columns: k },
    )
    f32View(host, out).set(f32View(host, product), e * n * k)
    product.dispose()
  }
  return [out]
}
