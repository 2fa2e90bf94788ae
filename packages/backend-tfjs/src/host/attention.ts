/**
 * @file Attention on host memory, one (sequence, head) at a time, so that only the scores of a single head are stored.
 *
 * Legend: B batch, T queries, S keys, H heads, G key/value heads, K features of a key, V features of a value.
 */
import type { AttentionAttrs, TensorSpec, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { type MatrixView, plainMatrix, plainProduct, viewProduct } from './matmul.ts'
import { f32Of, type Host, i32Of } from './memory.ts'

const f32View = (host: Host, tensor: TfTensor): Float32Array => host.view(tensor) as Float32Array

/** Head `head` of sequence `b` of a `[B, T, H, D]` tensor as a matrix `[T, D]`. */
function headMatrix(value: Value, b: number, head: number): MatrixView {
  const [, time, heads, features] = value.shape
  const start = (b * time * heads + head) * features
  return { tensor: tensorOf(value), start, row: heads * features, column: 1, rows: time, columns: features }
}

const turned = ({ tensor, start, row, column, rows, columns }: MatrixView): MatrixView => ({
  tensor,
  start,
  row: column,
  column: row,
  rows: columns,
  columns: rows,
})

const whole = (tensor: TfTensor): MatrixView => ({
  tensor,
  start: 0,
  row: tensor.shape[1],
  column: 1,
  rows: tensor.shape[0],
  columns: tensor.shape[1],
})

/** Index of the first key that query `t` of `time` may not see. */
function visibleEnd(t: number, time: number, limit: number, causal: boolean): number {
  return causal ? Math.max(0, Math.min(limit, limit - time + t + 1)) : limit
}

function limitsOf(host: Host, lengths: Value | undefined, batch: number, keys: number): number[] {
  if (lengths === undefined) return new Array<number>(batch).fill(keys)
  return Array.from(i32Of(host, lengths), length => Math.max(0, Math.min(keys, length)))
}

/** Index of the first key that query `t` of sequence b sees. */
function startsOf(host: Host, starts: Value | undefined, time: number): (b: number, t: number) => number {
  if (starts === undefined) return () => 0
  const first = i32Of(host, starts)
  return (b, t) => Math.max(0, first[b * time + t])
}

/** Replaces the scores `[T, S]`: subtracts `shift` of the row from every visible score, hides the others, and takes exp. */
function exponentials(
  host: Host,
  scores: TfTensor,
  scale: number,
  limit: number,
  first: (t: number) => number,
  causal: boolean,
  shift: (t: number, largest: number) => number,
): TfTensor {
  const [time, keys] = scores.shape
  const s = f32View(host, scores)
  for (let t = 0; t < time; t++) {
    const row = t * keys
    const end = visibleEnd(t, time, limit, causal)
    const begin = Math.min(end, first(t))
    let largest = Number.NEGATIVE_INFINITY
    for (let i = row + begin; i < row + end; i++) {
      s[i] *= scale
      if (s[i] > largest || s[i] !== s[i]) largest = s[i]
    }
    const by = shift(t, largest === Number.NEGATIVE_INFINITY ? 0 : largest)
    for (let i = row + begin; i < row + end; i++) s[i] -= by
    s.fill(Number.NEGATIVE_INFINITY, row, row + begin)
    s.fill(Number.NEGATIVE_INFINITY, row + end, row + keys)
  }
  const p = host.runner.run('Exp', { x: scores })
  scores.dispose()
  return p
}

/** Writes a `[T, D]` matrix into a head of a `[B, T, H, D]` tensor, or adds it with `add`. */
function putHead(
  host: Host,
  matrix: TfTensor,
  out: TfTensor,
  b: number,
  head: number,
  turn: boolean,
  add: boolean,
): void {
  const [, time, heads, features] = out.shape
  const [from, to] = [f32View(host, matrix), f32View(host, out)]
  const [row, column] = turn ? [1, time] : [features, 1]
  for (let t = 0; t < time; t++) {
    const target = ((b * time + t) * heads + head) * features
    const source = t * row
    if (add) for (let j = 0; j < features; j++) to[target + j] += from[source + j * column]
    else for (let j = 0; j < features; j++) to[target + j] = from[source + j * column]
  }
}

export function attention(host: Host, inputs: readonly Value[], attrs: AttentionAttrs, specs: readonly TensorSpec[]) {
  const [q, k, v, lengths, starts] = inputs
  const [batch, time, heads] = q.shape
  const [, keys, groups] = k.shape
  if (batch * time * heads * keys * q.shape[3] === 0) return undefined
  const out = host.output(specs[0].shape, 'float32')
  const lse = host.output(specs[1].shape, 'float32')
  const limits = limitsOf(host, lengths, batch, keys)
  const first = startsOf(host, starts, time)
  const shifts = new Float64Array(time)
  for (let b = 0; b < batch; b++) {
    for (let g = 0; g < groups; g++) {
      const keysT = plainMatrix(host, turned(headMatrix(k, b, g)))
      const values = plainMatrix(host, headMatrix(v, b, g))
      for (let h = (g * heads) / groups; h < ((g + 1) * heads) / groups; h++) {
        const queries = plainMatrix(host, headMatrix(q, b, h))
        const scores = plainProduct(host, queries, keysT)
        queries.dispose()
        const p = exponentials(
          host,
          scores,
          attrs.scale,
          limits[b],
          t => first(b, t),
          attrs.causal,
          (t, largest) => {
            shifts[t] = largest
            return largest
          },
        )
        const mixed = plainProduct(host, p, values)
        finishRows(f32View(host, p), f32View(host, mixed), f32View(host, lse), (b * heads + h) * time, shifts)
        p.dispose()
        putHead(host, mixed, out, b, h, false, false)
        mixed.dispose()
      }
      keysT.dispose()
      values.dispose()
    }
  }
  return [out, lse]
}

/** Divides each row by the sum of its exponentials and stores the log-sum-exp. */
function finishRows(p: Float32Array, mixed: Float32Array, lse: Float32Array, at: number, shifts: Float64Array): void {
  const time = shifts.length
  const keys = p.length / time
  const features = mixed.length / time
  for (let t = 0; t < time; t++) {
    let sum = 0
    for (let i = t * keys; i < (t + 1) * keys; i++) sum += p[i]
    lse[at + t] = shifts[t] + Math.log(sum)
    const factor = sum === 0 ? 0 : 1 / sum
    for (let i = t * features; i < (t + 1) * features; i++) mixed[i] *= factor
  }
}

export function attentionBackward(
  host: Host,
  inputs: readonly Value[],
  { causal, scale }: AttentionAttrs,
  specs: readonly TensorSpec[],
) {
  const [q, k, v, out, lse, dout, lengths, starts] = inputs
  const [batch, time, heads] = q.shape
  const [, keys, groups] = k.shape
  if (batch * time * heads * keys * q.shape[3] * v.shape[3] === 0) return undefined
  const [dq, dk, dv] = specs.map(({ shape }) => host.output(shape, 'float32'))
  f32View(host, dk).fill(0)
  f32View(host, dv).fill(0)
  const limits = limitsOf(host, lengths, batch, keys)
  const first = startsOf(host, starts, time)
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < heads; h++) {
      const g = Math.floor((h * groups) / heads)
      const [queries, douts, keyHead] = [headMatrix(q, b, h), headMatrix(dout, b, h), headMatrix(k, b, g)]
      const at = (b * heads + h) * time
      const scores = viewProduct(host, queries, turned(keyHead))
      const logs = f32Of(host, lse).slice(at, at + time)
      const p = exponentials(
        host,
        scores,
        scale,
        limits[b],
        t => first(b, t),
        causal,
        t => (Number.isFinite(logs[t]) ? logs[t] : 0),
      )
      const dp = viewProduct(host, douts, turned(headMatrix(v, b, g)))
      // Gradients of keys and values are computed transposed, [D, S], so that the smaller operand is the one to transpose.
      const dvT = viewProduct(host, turned(douts), whole(p))
      putHead(host, dvT, dv, b, g, true, true)
      dvT.dispose()
      const deltas = rowProducts(f32Of(host, dout), f32Of(host, out), douts)
      scoreGradients(f32View(host, p), f32View(host, dp), deltas, scale)
      p.dispose()
      const dqHead = viewProduct(host, whole(dp), keyHead)
      putHead(host, dqHead, dq, b, h, false, false)
      dqHead.dispose()
      const dkT = viewProduct(host, turned(queries), whole(dp))
      putHead(host, dkT, dk, b, g, true, true)
      dkT.dispose()
      dp.dispose()
    }
  }
  return [dq, dk, dv]
}

/** Sum over features of a * b for every row of a head. */
function rowProducts(a: Float32Array, b: Float32Array, { start, row, rows, columns }: MatrixView): Float64Array {
  const sums = new Float64Array(rows)
  for (let t = 0; t < rows; t++) {
    for (let j = start + t * row; j < start + t * row + columns; j++) sums[t] += a[j] * b[j]
  }
  return sums
}

/** Replaces dp by p * (dp - delta) * scale. */
function scoreGradients(p: Float32Array, dp: Float32Array, deltas: Float64Array, scale: number): void {
  const keys = p.length / deltas.length
  for (let t = 0, i = 0; t < deltas.length; t++) {
    for (let s = 0; s < keys; s++, i++) dp[i] = p[i] === 0 ? 0 : p[i] * (dp[i] - deltas[t]) * scale
  }
}
