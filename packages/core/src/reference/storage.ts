/** @file Buffers of the reference backend. Floats are stored as f64, so f32 tensors are not rounded at all. */
import { type DType, decodeHost, encodeHost, type HostArray } from '../dtype.ts'
import type { Shape } from '../shape.ts'

/** The elements of a tensor on the reference backend: f64 for all floats, unchanged for i32 and u8. */
export type Numbers = Float64Array | Int32Array | Uint8Array

/** A reference-counted array of numbers. */
export interface Storage {
  data: Numbers
  readonly dtype: DType
  refs: number
}

/** A handle of the reference backend: one owner's reference to a storage. */
export interface ReferenceHandle {
  readonly storage: Storage
}

export function allocate(dtype: DType, length: number): Numbers {
  if (dtype === 'i32') return new Int32Array(length)
  return dtype === 'u8' ? new Uint8Array(length) : new Float64Array(length)
}

export function fromHostArray(data: HostArray, dtype: DType): Numbers {
  const decoded = decodeHost(dtype, data)
  if (dtype === 'i32') return Int32Array.from(decoded)
  return dtype === 'u8' ? Uint8Array.from(decoded) : Float64Array.from(decoded)
}

export function toHostArray(data: Numbers, dtype: DType): HostArray {
  return encodeHost(dtype, dtype === 'i32' || dtype === 'u8' ? data.slice() : Float32Array.from(data))
}

/**
 * Returns, for every element of `out` in row-major order, its flat position in a tensor of shape `from` that is
 * broadcast to `out`.
 */
export function broadcastIndex(from: Shape, out: Shape): Int32Array {
  const total = out.reduce((a, b) => a * b, 1)
  const index = new Int32Array(total)
  const strides = new Array<number>(out.length).fill(0)
  let stride = 1
  for (let i = 1; i <= from.length; i++) {
    const size = from[from.length - i]
    if (size !== 1) strides[out.length - i] = stride
    stride *= size
  }
  walk(out, strides, 0, (flat, at) => {
    index[flat] = at
  })
  return index
}

/** Visits the elements of a box of `shape` in row-major order, with their positions under the given strides. */
export function walk(
  shape: Shape,
  strides: readonly number[],
  start: number,
  visit: (flat: number, at: number) => void,
): void {
  let flat = 0
  const descend = (axis: number, at: number) => {
    if (axis === shape.length) {
      visit(flat++, at)
      return
    }
    for (let i = 0, position = at; i < shape[axis]; i++, position += strides[axis]) descend(axis + 1, position)
  }
  descend(0, start)
}
