/**
 * @file Gathers and scatters rows with TensorFlow.js kernels. With synchronous reads, the indices (which are small) are read on the host; otherwise everything
 * stays on the device.
 */
import { type PrimitiveAttrs, type Shape, sizeOf, type TensorSpec, type Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { numeric } from './movement.ts'
import { type Device, type Ops, tfDType } from './ops.ts'

type Kernel<Attrs> = (
  device: Device,
  op: Ops,
  inputs: readonly Value[],
  attrs: Attrs,
  outputs: readonly TensorSpec[],
) => TfTensor[]

/** `[n]` or `[n, 1, 1, ...]`, to broadcast over the other axes of a row. */
const perRow = (op: Ops, x: TfTensor, shape: Shape): TfTensor =>
  op.as(x, [x.shape[0], ...new Array<number>(shape.length - 1).fill(1)])

function insideRange(values: ArrayLike<number>, rows: number): boolean {
  for (let i = 0; i < values.length; i++) if (values[i] < 0 || values[i] >= rows) return false
  return true
}

export const takeRows: Kernel<PrimitiveAttrs['takeRows']> = (device, op, [x, index], _, [{ shape, dtype }]) => {
  const rows = x.shape[0]
  const at = op.as(tensorOf(index), [sizeOf(index.shape)])
  if (rows === 0) return [op.fill(shape, 0, tfDType(dtype))]
  const from = numeric(op, x)
  if (device.syncReads && insideRange(op.read(at), rows)) return [op.as(op.gather(from, at), shape)]
  const zero = op.scalar(0, 'int32')
  const inside = op.and(op.lessEqual(zero, at), op.less(at, op.scalar(rows, 'int32')))
  const taken = op.gather(from, op.select(inside, at, zero, at.shape))
  const nothing = op.scalar(0, tfDType(dtype))
  return [op.as(op.select(perRow(op, inside, taken.shape), taken, nothing, taken.shape), shape)]
}

/** Rows of a one-hot matrix that are created at a time; limits its memory to 64 MiB of f32. */
const oneHotElements = 1 << 24

export const scatterAddRows: Kernel<PrimitiveAttrs['scatterAddRows']> = (
  device,
  op,
  [index, source],
  { rows },
  [spec],
) => {
  const count = sizeOf(index.shape)
  const features = sizeOf(spec.shape.slice(1))
  if (count === 0) return [op.fill(spec.shape, 0, tfDType(spec.dtype))]
  const at = op.as(tensorOf(index), [count])
  const flat = op.as(tensorOf(source), [count, features])
  const sums = spec.dtype === 'i32' || device.syncReads ? hostSums(device, op, at, flat, rows) : null
  return [op.as(sums ?? oneHotSums(op, at, flat, rows), spec.shape)]
}

/** In source order on the host: exact for i32 and deterministic, at the cost of two copies. Null without synchronous reads. */
function hostSums(device: Device, op: Ops, at: TfTensor, flat: TfTensor, rows: number): TfTensor | null {
  if (!device.syncReads) return flat.dtype === 'int32' ? integerSums(op, at, flat, rows) : null
  const [index, from] = [op.read(at), op.read(flat)]
  const size = flat.shape[1]
  const sums = flat.dtype === 'int32' ? new Int32Array(rows * size) : new Float32Array(rows * size)
  for (let i = 0; i < index.length; i++) {
    if (index[i] < 0 || index[i] >= rows) continue
    for (let j = 0, to = index[i] * size; j < size; j++) sums[to + j] += from[i * size + j]
  }
  return op.upload(sums, [rows, size])
}

/** True where row r takes source i: `bool [rows, count]`. Indices out of range match no row. */
function hits(op: Ops, at: TfTensor, rows: number): TfTensor {
  const lines = op.upload(
    Int32Array.from({ length: rows }, (_, r) => r),
    [rows, 1],
  )
  return op.equal(lines, op.as(at, [1, at.shape[0]]))
}

/** Matrix products with one-hot rows, a block of sources at a time. Without atomics, so results are deterministic. */
function oneHotSums(op: Ops, at: TfTensor, flat: TfTensor, rows: number): TfTensor {
  const [count, size] = flat.shape
  const step = Math.max(1, Math.floor(oneHotElements / Math.max(1, rows)))
  let sums: TfTensor | null = null
  for (let first = 0; first < count; first += step) {
    const many = Math.min(step, count - first)
    const block = many === count ? flat : op.slice(flat, [first, 0], [many, size])
    const index = many === count ? at : op.slice(at, [first], [many])
    const part = op.matmul(op.cast(hits(op, index, rows), 'float32'), block, false, false)
    sums = sums === null ? part : op.add(sums, part)
  }
  return sums as TfTensor
}

/** Integers cannot use f32 products, but their scatters are small. */
function integerSums(op: Ops, at: TfTensor, flat: TfTensor, rows: number): TfTensor {
  const [count, size] = flat.shape
  const chosen = op.as(op.cast(hits(op, at, rows), 'int32'), [rows, count, 1])
  return op.sum(op.mul(chosen, op.as(flat, [1, count, size])), [1])
}

export const setRows: Kernel<PrimitiveAttrs['setRows']> = (device, op, [x, index, source], _, [{ shape }]) => {
  const rows = shape[0]
  const count = sizeOf(index.shape)
  const from = tensorOf(x)
  if (count === 0) return [op.reshape(from, shape)]
  const writer = device.syncReads
    ? writersOnHost(op, tensorOf(index), rows)
    : writersOnDevice(op, tensorOf(index), rows)
  const zero = op.scalar(0, 'int32')
  const written = op.lessEqual(zero, writer)
  const taken = op.gather(tensorOf(source), op.select(written, writer, zero, [rows]))
  return [op.select(perRow(op, written, shape), taken, from, shape)]
}

/** For every row the last source that writes it, or -1: `int32 [rows]`. */
function writersOnHost(op: Ops, index: TfTensor, rows: number): TfTensor {
  const writers = new Int32Array(rows).fill(-1)
  const at = op.read(index)
  for (let i = 0; i < at.length; i++) if (at[i] >= 0 && at[i] < rows) writers[at[i]] = i
  return op.upload(writers, [rows])
}

function writersOnDevice(op: Ops, index: TfTensor, rows: number): TfTensor {
  const count = index.shape[0]
  const numbers = op.upload(
    Int32Array.from({ length: count }, (_, i) => i + 1),
    [1, count],
  )
  const last = op.max(op.mul(op.cast(hits(op, index, rows), 'int32'), numbers), [1])
  return op.sub(last, op.scalar(1, 'int32'))
}
