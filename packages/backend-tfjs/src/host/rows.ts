/** @file Gathers and scatters rows on host memory. Indices out of range are never accessed. */
import { type PrimitiveAttrs, sizeOf, type TensorSpec, type Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { type Elements, elementsOf, type Host, i32Of, tfDType } from './memory.ts'

export function copyRow(from: Elements, source: number, to: Elements, target: number, size: number): void {
  if (size >= 48) to.set(from.subarray(source, source + size), target)
  else for (let j = 0; j < size; j++) to[target + j] = from[source + j]
}

export function takeRows(
  host: Host,
  [x, index]: readonly Value[],
  _: PrimitiveAttrs['takeRows'],
  [spec]: readonly TensorSpec[],
): TfTensor[] {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = host.view(out)
  const [from, rows] = [elementsOf(host, x), i32Of(host, index)]
  const size = sizeOf(x.shape.slice(1))
  for (let i = 0; i < rows.length; i++) {
    if (rows[i] >= 0 && rows[i] < x.shape[0]) copyRow(from, rows[i] * size, to, i * size, size)
    else to.fill(0, i * size, (i + 1) * size)
  }
  return [out]
}

export function scatterAddRows(
  host: Host,
  [index, source]: readonly Value[],
  attrs: PrimitiveAttrs['scatterAddRows'],
  [spec]: readonly TensorSpec[],
): TfTensor[] {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = host.view(out).fill(0)
  const [rows, from] = [i32Of(host, index), elementsOf(host, source)]
  const size = sizeOf(spec.shape.slice(1))
  for (let i = 0; i < rows.length; i++) {
    if (rows[i] < 0 || rows[i] >= attrs.rows) continue
    const target = rows[i] * size
    for (let j = 0; j < size; j++) to[target + j] += from[i * size + j]
  }
  return [out]
}

/** Copies x even if it is donated: a wasm tensor that was an operand of a matrix product must not change, because its packed form is cached. */
export function setRows(
  host: Host,
  [x, index, source]: readonly Value[],
  _: PrimitiveAttrs['setRows'],
  [spec]: readonly TensorSpec[],
): TfTensor[] {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = host.view(out)
  to.set(elementsOf(host, x))
  const [rows, from] = [i32Of(host, index), elementsOf(host, source)]
  const size = sizeOf(spec.shape.slice(1))
  for (let i = 0; i < rows.length; i++) {
    if (rows[i] >= 0 && rows[i] < x.shape[0]) copyRow(from, i * size, to, rows[i] * size, size)
  }
  return [out]
}
