/** @file The dtypes of safetensors files: their names in the file, their sizes, and their host arrays. */

import type { DType } from '@moe/core'

/**
 * Dtype of a stored tensor: the dtypes of `@moe/core` and those that only occur in files. `f4`, `f6e2m3` and `f6e3m2` are packed (4 and
 * 6 bits per element); `c64` is a pair of f32.
 */
export type StoredDType =
  | DType
  | 'f64'
  | 'i64'
  | 'u64'
  | 'u32'
  | 'i16'
  | 'u16'
  | 'i8'
  | 'bool'
  | 'f8e5m2'
  | 'f8e4m3fnuz'
  | 'f8e5m2fnuz'
  | 'f8e8m0'
  | 'f4'
  | 'f6e2m3'
  | 'f6e3m2'
  | 'c64'

/**
 * Host array of a stored tensor. `bf16` and `f16` are 16-bit patterns in a `Uint16Array`; `bool` (0 or 1), floats of 4 to 8 bits, and
 * `c64` are raw bytes in a `Uint8Array`; `i64` and `u64` are `BigInt64Array` and `BigUint64Array`.
 */
export type StoredArray =
  | Float32Array
  | Float64Array
  | Int32Array
  | Uint32Array
  | Int16Array
  | Uint16Array
  | Int8Array
  | Uint8Array
  | BigInt64Array
  | BigUint64Array

interface ArrayClass {
  readonly BYTES_PER_ELEMENT: number
  new (buffer: ArrayBufferLike, byteOffset: number, length: number): StoredArray
}

interface Format {
  /** Name in the header of a file. */
  readonly name: string
  readonly bits: number
  readonly array: ArrayClass
}

const formats: Readonly<Record<StoredDType, Format>> = {
  f64: { name: 'F64', bits: 64, array: Float64Array },
  f32: { name: 'F32', bits: 32, array: Float32Array },
  bf16: { name: 'BF16', bits: 16, array: Uint16Array },
  f16: { name: 'F16', bits: 16, array: Uint16Array },
  f8e4m3: { name: 'F8_E4M3', bits: 8, array: Uint8Array },
  f8e5m2: { name: 'F8_E5M2', bits: 8, array: Uint8Array },
  f8e4m3fnuz: { name: 'F8_E4M3FNUZ', bits: 8, array: Uint8Array },
  f8e5m2fnuz: { name: 'F8_E5M2FNUZ', bits: 8, array: Uint8Array },
  f8e8m0: { name: 'F8_E8M0', bits: 8, array: Uint8Array },
  f6e2m3: { name: 'F6_E2M3', bits: 6, array: Uint8Array },
  f6e3m2: { name: 'F6_E3M2', bits: 6, array: Uint8Array },
  f4: { name: 'F4', bits: 4, array: Uint8Array },
  c64: { name: 'C64', bits: 64, array: Uint8Array },
  i64: { name: 'I64', bits: 64, array: BigInt64Array },
  u64: { name: 'U64', bits: 64, array: BigUint64Array },
  i32: { name: 'I32', bits: 32, array: Int32Array },
  u32: { name: 'U32', bits: 32, array: Uint32Array },
  i16: { name: 'I16', bits: 16, array: Int16Array },
  u16: { name: 'U16', bits: 16, array: Uint16Array },
  i8: { name: 'I8', bits: 8, array: Int8Array },
  u8: { name: 'U8', bits: 8, array: Uint8Array },
  bool: { name: 'BOOL', bits: 8, array: Uint8Array },
}

const byName = new Map(Object.entries(formats).map(([dtype, format]) => [format.name, dtype as StoredDType]))

/** The name of a dtype in the header of a file, for example `BF16` for `bf16`. */
export const storedName = (dtype: StoredDType): string => formats[dtype].name

/** The dtype with a name in a header, or undefined if the format has none. */
export const dtypeOfName = (name: string): StoredDType | undefined => byName.get(name)

/** All dtype names that a header may contain. */
export const storedNames = (): string[] => [...byName.keys()]

/** Whether a value is the name of a dtype of this package. */
export const isStoredDType = (value: unknown): value is StoredDType =>
  typeof value === 'string' && Object.hasOwn(formats, value)

/** Bits per element. */
export const storedBits = (dtype: StoredDType): number => formats[dtype].bits

/**
 * The size of a tensor in bytes.
 *
 * @returns NaN if it is not an integer below 2^53, so that an invalid size cannot go unnoticed
 */
export function storedBytes(dtype: StoredDType, shape: readonly number[]): number {
  // A tensor with an axis of size 0 is empty, however large the other axes are.
  if (shape.includes(0)) return 0
  const bits = shape.reduce((product, size) => product * size, formats[dtype].bits)
  return Number.isSafeInteger(bits) && bits % 8 === 0 ? bits / 8 : Number.NaN
}

/** Views bytes as the host array of a dtype. The byte offset must be aligned to the element size. */
export function viewStored(dtype: StoredDType, bytes: Uint8Array): StoredArray {
  const { array } = formats[dtype]
  return new array(bytes.buffer, bytes.byteOffset, bytes.byteLength / array.BYTES_PER_ELEMENT)
}

/** The bytes of a host array. Undefined if it is neither the array type of the dtype nor raw bytes. */
export function bytesOf(dtype: StoredDType, data: unknown): Uint8Array | undefined {
  if (data instanceof formats[dtype].array || data instanceof Uint8Array) {
    const view = data as Uint8Array
    return new Uint8Array(view.buffer, view.byteOffset, view.byteLength)
  }
  return undefined
}

/** The name of the host array class of a dtype, for error messages. */
export const arrayName = (dtype: StoredDType): string => (formats[dtype].array as unknown as { name: string }).name
