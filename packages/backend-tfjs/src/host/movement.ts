/** @file Primitives that move elements without computing: permute, expand, slice, pad, concat. For all dtypes. */
import { type PrimitiveAttrs, type Shape, stridesOf, type TensorSpec, type Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { elementsOf, type Host, tfDType } from './memory.ts'
import { broadcastStrides, copyBox } from './strided.ts'

/** Copies x, read with `strides` from `start`, into a new tensor of the output's shape. */
function gather(host: Host, x: Value, spec: TensorSpec, strides: readonly number[], start = 0): TfTensor {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = { data: host.view(out), start: 0, strides: stridesOf(spec.shape) }
  copyBox(spec.shape, { data: elementsOf(host, x), start, strides }, to)
  return out
}

const offsetOf = (at: readonly number[], strides: Shape): number =>
  at.reduce((sum, n, axis) => sum + n * strides[axis], 0)

export function permute(
  host: Host,
  [x]: readonly Value[],
  { axes }: PrimitiveAttrs['permute'],
  [spec]: readonly TensorSpec[],
) {
  const strides = stridesOf(x.shape)
  return [
    gather(
      host,
      x,
      spec,
      axes.map(axis => strides[axis]),
    ),
  ]
}

export function expand(host: Host, [x]: readonly Value[], _: PrimitiveAttrs['expand'], [spec]: readonly TensorSpec[]) {
  return [gather(host, x, spec, broadcastStrides(x.shape, spec.shape))]
}

export function slice(
  host: Host,
  [x]: readonly Value[],
  { starts }: PrimitiveAttrs['slice'],
  [spec]: readonly TensorSpec[],
) {
  const strides = stridesOf(x.shape)
  return [gather(host, x, spec, strides, offsetOf(starts, strides))]
}

export function pad(host: Host, [x]: readonly Value[], attrs: PrimitiveAttrs['pad'], [spec]: readonly TensorSpec[]) {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const data = host.view(out).fill(attrs.value)
  const strides = stridesOf(spec.shape)
  const from = { data: elementsOf(host, x), start: 0, strides: stridesOf(x.shape) }
  copyBox(x.shape, from, { data, start: offsetOf(attrs.before, strides), strides })
  return [out]
}

export function concat(
  host: Host,
  parts: readonly Value[],
  { axis }: PrimitiveAttrs['concat'],
  [spec]: readonly TensorSpec[],
) {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const data = host.view(out)
  const strides = stridesOf(spec.shape)
  let done = 0
  for (const part of parts) {
    const from = { data: elementsOf(host, part), start: 0, strides: stridesOf(part.shape) }
    copyBox(part.shape, from, { data, start: done * strides[axis], strides })
    done += part.shape[axis]
  }
  return [out]
}
