/** @file Buffers of the reference backend. Floats are stored as f64, so f32 tensors are not rounded at all. */
import { type DType, decodeHost, encodeHost, type HostArray } from '../dtype.ts'
import { type Shape, sizeOf, stridesOf } from '../shape.ts'

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

/** Returns the positions of the elements of a box of `shape` under the given strides, in row-major order. */
export function positions(shape: Shape, strides: readonly number[], start = 0): Int32Array {
  const at = new Int32Array(sizeOf(shape)).fill(start)
  // The positions behind an axis are the same for each of its indices, except for their offset.
  let block = 1
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    for (let i = 1; i < shape[axis]; i++) {
      const offset = i * strides[axis]
      for (let j = 0; j < block; j++) at[i * block + j] = at[j] + offset
    }
    block *= shape[axis]
  }
  return at
}

/** Returns the strides of a tensor of shape `from` that is broadcast to `to`. */
export function broadcastStrides(from: Shape, to: Shape): number[] {
  const missing = to.length - from.length
  const strides = stridesOf(from)
  return to.map((_, axis) => (axis < missing || from[axis - missing] === 1 ? 0 : strides[axis - missing]))
}
