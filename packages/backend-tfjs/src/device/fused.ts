/**
 * @file Fused ops that TensorFlow.js kernels compute better than core's decompositions. Without synchronous reads, those that need the experts' offsets decline, and
 * core multiplies every row by every expert and masks the results.
 */
import { type FusedAttrs, sizeOf, type TensorSpec, type Value } from '@moe/core'
import { planSlots } from '../dispatch-plan.ts'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import type { Device, Ops } from './ops.ts'

type Kernel<Attrs> = (
  device: Device,
  op: Ops,
  inputs: readonly Value[],
  attrs: Attrs,
  outputs: readonly TensorSpec[],
) => TfTensor[] | undefined

export const softmax: Kernel<FusedAttrs['softmax']> = ({ runner }, op, [x], _, [{ shape }]) => {
  const logits = tensorOf(x)
  const y = runner.run('Softmax', { logits }, { dim: shape.length - 1 })
  const masked = op.equal(op.max(logits, [shape.length - 1]), op.scalar(Number.NEGATIVE_INFINITY, 'float32'))
  const rows = op.as(masked, [...shape.slice(0, -1), 1])
  return [op.select(rows, op.scalar(0, 'float32'), y, shape)]
}

export const dispatchPlan: Kernel<FusedAttrs['dispatchPlan']> = (device, op, [indices], { experts }, specs) => {
  if (!device.syncReads) return undefined
  const { order, positions, offsets, counts } = planSlots(op.read(tensorOf(indices)), experts)
  return [order, positions, offsets, counts].map((part, i) => op.upload(part, specs[i].shape))
}

interface Range {
  readonly expert: number
  readonly start: number
  readonly rows: number
}

function readRanges(op: Ops, offsets: Value, rows: number): Range[] {
  const at = op.read(tensorOf(offsets))
  const cut = (row: number) => Math.max(0, Math.min(rows, row))
  return Array.from({ length: at.length - 1 }, (_, expert) => {
    const start = cut(at[expert])
    return { expert, start, rows: Math.max(0, cut(at[expert + 1]) - start) }
  })
}

export const groupedMatmul: Kernel<FusedAttrs['groupedMatmul']> = (
  device,
  op,
  [x, weight, offsets],
  attrs,
  [{ shape }],
) => {
  if (!device.syncReads || sizeOf(x.shape) === 0 || offsets.shape[0] < 2) return undefined
  const [rows, n] = shape
  const [, a, b] = weight.shape
  const from = tensorOf(x)
  const parts: TfTensor[] = []
  let end = 0
  for (const range of readRanges(op, offsets, rows)) {
    if (range.rows === 0) continue
    if (range.start > end) parts.push(op.fill([range.start - end, n], 0, 'float32'))
    const own = op.slice(from, [range.start, 0], [range.rows, x.shape[1]])
    const matrix = op.as(op.slice(tensorOf(weight), [range.expert, 0, 0], [1, a, b]), [a, b])
    parts.push(op.matmul(own, matrix, false, attrs.transposeW))
    end = range.start + range.rows
  }
  if (end < rows) parts.push(op.fill([rows - end, n], 0, 'float32'))
  return [parts.length === 1 ? parts[0] : op.concat(parts, 0)]
}

export const groupedMatmulWeightGrad: Kernel<FusedAttrs['groupedMatmulWeightGrad']> = (
  device,
  op,
  [x, dy, offsets],
  _,
  [{ shape }],
) => {
  if (!device.syncReads) return undefined
  const [, n, k] = shape
  const parts = readRanges(op, offsets, x.shape[0]).map(({ start, rows }) => {
    if (rows === 0) return op.fill([1, n, k], 0, 'float32')
    const left = op.slice(tensorOf(dy), [start, 0], [rows, n])
    const right = op.slice(tensorOf(x), [start, 0], [rows, k])
    return op.as(op.matmul(left, right, true, false), [1, n, k])
  })
  return [parts.length === 1 ? parts[0] : op.concat(parts, 0)]
}
