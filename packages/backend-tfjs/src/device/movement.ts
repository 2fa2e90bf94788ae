/** @file Reductions, matrix products and movement ops as TensorFlow.js kernels. */
import { type PrimitiveAttrs, sameShape, sizeOf, type TensorSpec, type Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { type Device, type Ops, tfDType } from './ops.ts'

type Kernel<Attrs> = (
  device: Device,
  op: Ops,
  inputs: readonly Value[],
  attrs: Attrs,
  outputs: readonly TensorSpec[],
) => TfTensor[]

/** u8 as int32, so that one dtype of kernels is enough. */
export const numeric = (op: Ops, value: Value): TfTensor => {
  const x = tensorOf(value)
  return x.dtype === 'bool' ? op.cast(x, 'int32') : x
}

export const reduce: Kernel<PrimitiveAttrs['reduce']> = (device, op, [value], { code, axes }, [spec]) => {
  const x = tensorOf(value)
  const { shape, dtype } = spec
  const least = dtype === 'i32' ? -(2 ** 31) : Number.NEGATIVE_INFINITY
  if (sizeOf(x.shape) === 0) return [op.fill(shape, code === 'sum' ? 0 : least, tfDType(dtype))]
  if (code === 'sum') return [op.as(op.sum(x, axes), shape)]
  const y = op.as(op.max(x, axes), shape)
  if (dtype === 'i32' || device.maxKeepsNaN) return [y]
  const bad = op.as(op.sum(op.cast(op.isNaN(x), 'float32'), axes), shape)
  return [op.select(op.less(op.scalar(0, 'float32'), bad), op.scalar(Number.NaN, 'float32'), y, shape)]
}

export const cumsum: Kernel<PrimitiveAttrs['cumsum']> = (_, op, [x], { axis }) => [op.cumsum(tensorOf(x), axis)]

export const topk: Kernel<PrimitiveAttrs['topk']> = ({ runner }, op, [value], { k }) => {
  const x = tensorOf(value)
  const keys = op.select(op.isNaN(x), op.scalar(Number.NEGATIVE_INFINITY, 'float32'), x, x.shape)
  return runner.runAll('TopK', { x: keys }, { k, sorted: true })
}

export const matmul: Kernel<PrimitiveAttrs['matmul']> = (_, op, inputs, { transposeA, transposeB }, [{ shape }]) => {
  const [a, b] = inputs.map(tensorOf)
  if (sizeOf(a.shape) === 0) return [op.fill(shape, 0, 'float32')]
  return [op.matmul(a, b, transposeA, transposeB)]
}

export const permute: Kernel<PrimitiveAttrs['permute']> = (_, op, [x], { axes }) => [op.transpose(numeric(op, x), axes)]

export const expand: Kernel<PrimitiveAttrs['expand']> = (_, op, [x], __, [{ shape }]) => {
  const y = op.expand(numeric(op, x), shape)
  return [sameShape(x.shape, shape) ? op.reshape(y, shape) : y]
}

export const slice: Kernel<PrimitiveAttrs['slice']> = (_, op, [x], { starts }, [{ shape }]) => [
  op.slice(numeric(op, x), starts, shape),
]

export const pad: Kernel<PrimitiveAttrs['pad']> = (_, op, [x], { before, value }, [spec]) => {
  if (sizeOf(x.shape) === 0) return [op.fill(spec.shape, value, tfDType(spec.dtype))]
  const after = before.map((n, axis) => spec.shape[axis] - n - x.shape[axis])
  const y = op.pad(tensorOf(x), before, after, value)
  return [sizeOf(spec.shape) === sizeOf(x.shape) ? op.reshape(y, spec.shape) : y]
}

export const concat: Kernel<PrimitiveAttrs['concat']> = (_, op, parts, { axis }, [{ shape }]) => {
  const filled = parts.filter(part => sizeOf(part.shape) > 0).map(part => numeric(op, part))
  return [filled.length === 1 ? op.reshape(filled[0], shape) : op.concat(filled, axis)]
}
