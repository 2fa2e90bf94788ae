/** @file Element types: their sizes, host arrays and the bit codecs for the ones JavaScript has no array for. */

/** Element types of tensors. Arithmetic is done in `f32`; the 16- and 8-bit floats are storage and matmul-input formats. */
export type DType = 'f32' | 'bf16' | 'f16' | 'f8e4m3' | 'i32' | 'u8'

/** Host array of each dtype. `bf16` and `f16` travel as raw 16-bit patterns, `f8e4m3` as raw bytes. */
export type HostArray = Float32Array | Int32Array | Uint16Array | Uint8Array

/** All element types. */
export const dtypes: readonly DType[] = ['f32', 'bf16', 'f16', 'f8e4m3', 'i32', 'u8']

/** Bytes of one element. */
export const dtypeBytes: Readonly<Record<DType, number>> = { f32: 4, bf16: 2, f16: 2, f8e4m3: 1, i32: 4, u8: 1 }

/** Whether the dtype holds floating-point numbers, and so can carry gradients after a cast to f32. */
export const isFloat = (dtype: DType): boolean => dtype !== 'i32' && dtype !== 'u8'

/** A zeroed host array for `length` elements. */
export function hostArray(dtype: DType, length: number): HostArray {
  switch (dtype) {
    case 'f32':
      return new Float32Array(length)
    case 'i32':
      return new Int32Array(length)
    case 'bf16':
    case 'f16':
      return new Uint16Array(length)
    case 'f8e4m3':
    case 'u8':
      return new Uint8Array(length)
  }
}

/** View bytes as the host array of `dtype`; copies only when the offset is not aligned. */
export function viewBytes(dtype: DType, bytes: Uint8Array): HostArray {
  const size = dtypeBytes[dtype]
  const aligned = bytes.byteOffset % size === 0 ? bytes : bytes.slice()
  const length = aligned.byteLength / size
  switch (dtype) {
    case 'f32':
      return new Float32Array(aligned.buffer, aligned.byteOffset, length)
    case 'i32':
      return new Int32Array(aligned.buffer, aligned.byteOffset, length)
    case 'bf16':
    case 'f16':
      return new Uint16Array(aligned.buffer, aligned.byteOffset, length)
    case 'f8e4m3':
    case 'u8':
      return aligned
  }
}

const f32Scratch = new Float32Array(1)
const u32Scratch = new Uint32Array(f32Scratch.buffer)

/** f32 to bf16 bits, round to nearest even; NaN stays a (quiet) NaN. */
export function toBf16(value: number): number {
  f32Scratch[0] = value
  const bits = u32Scratch[0]
  if ((bits & 0x7fffffff) > 0x7f800000) return ((bits >>> 16) | 0x40) & 0xffff
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff
}

/** bf16 bits to a number, exact. */
export function fromBf16(bits: number): number {
  u32Scratch[0] = bits << 16
  return f32Scratch[0]
}

/** f32 to IEEE binary16 bits, round to nearest even, overflow to infinity, subnormals kept. */
export function toF16(value: number): number {
  f32Scratch[0] = value
  const bits = u32Scratch[0]
  const sign = (bits >>> 16) & 0x8000
  const magnitude = bits & 0x7fffffff
  if (magnitude > 0x7f800000) return sign | 0x7e00
  if (magnitude >= 0x47800000) return sign | 0x7c00
  if (magnitude < 0x38800000) {
    // Subnormal half: one unit is 2^-24. Scaling by a power of two is exact, so rounding happens once.
    const scaled = Math.abs(f32Scratch[0]) * 16777216
    return sign | roundHalfEven(scaled)
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1)
  return sign | ((rounded - 0x38000000) >>> 13)
}

/** IEEE binary16 bits to a number, exact. */
export function fromF16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >>> 10) & 0x1f
  const fraction = bits & 0x3ff
  if (exponent === 0) return sign * fraction * 2 ** -24
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}

/** Largest finite value of `f8e4m3` (the `fn` variant: no infinities, 0x7f and 0xff are NaN). */
export const f8e4m3Max = 448

/** Neighbours along the summed axis that share a scale in precision 'fp8'; those of an expert's weight gradient count from its first row. */
export const fp8Tile = 128

/** f32 to float8_e4m3fn bits, round to nearest even, saturating at ±448 (as hardware conversions do); NaN stays NaN. */
export function toF8e4m3(value: number): number {
  if (Number.isNaN(value)) return 0x7f
  const sign = value < 0 || Object.is(value, -0) ? 0x80 : 0
  const magnitude = Math.abs(value)
  if (magnitude >= f8e4m3Max) return sign | 0x7e
  if (magnitude < 2 ** -6) return sign | roundHalfEven(magnitude * 512)
  const exponent = Math.floor(Math.log2(magnitude))
  const mantissa = roundHalfEven(magnitude * 2 ** (3 - exponent))
  // A mantissa of 16 carries into the exponent, which the addition below does by itself.
  const code = ((exponent + 7) << 3) + (mantissa - 8)
  return sign | Math.min(code, 0x7e)
}

/** float8_e4m3fn bits to a number, exact. */
export function fromF8e4m3(bits: number): number {
  const sign = bits & 0x80 ? -1 : 1
  const exponent = (bits >>> 3) & 0xf
  const fraction = bits & 0x7
  if (exponent === 15 && fraction === 7) return Number.NaN
  if (exponent === 0) return sign * fraction * 2 ** -9
  return sign * (1 + fraction / 8) * 2 ** (exponent - 7)
}

function roundHalfEven(value: number): number {
  const floor = Math.floor(value)
  const rest = value - floor
  if (rest > 0.5 || (rest === 0.5 && floor % 2 === 1)) return floor + 1
  return floor
}

/** Decode a host array of any dtype to numbers (f32 and i32 arrays are returned as they are). */
export function decodeHost(dtype: DType, data: HostArray): Float32Array | Int32Array | Uint8Array {
  switch (dtype) {
    case 'f32':
      return data as Float32Array
    case 'i32':
      return data as Int32Array
    case 'u8':
      return data as Uint8Array
    default:
      return Float32Array.from(data, decoders[dtype])
  }
}

/** Encode numbers as the host array of a dtype. Integers are truncated toward zero, `u8` is clamped to 0..255. */
export function encodeHost(dtype: DType, values: ArrayLike<number>): HostArray {
  switch (dtype) {
    case 'f32':
      return values instanceof Float32Array ? values : Float32Array.from(values)
    case 'i32':
      return values instanceof Int32Array ? values : Int32Array.from(values)
    case 'u8':
      return values instanceof Uint8Array ? values : Uint8Array.from(Uint8ClampedArray.from(values, Math.trunc))
    case 'f8e4m3':
      return Uint8Array.from(values, toF8e4m3)
    default:
      return Uint16Array.from(values, encoders[dtype])
  }
}

const decoders = { bf16: fromBf16, f16: fromF16, f8e4m3: fromF8e4m3 }
const encoders = { bf16: toBf16, f16: toF16 }

const word = new ArrayBuffer(4)
const words = { f32: new Float32Array(word), u32: new Uint32Array(word) }

/** The element's bits as an unsigned number, which is how kernels that only move elements take a value. */
export function bitsOf(value: number, dtype: DType): number {
  if (dtype === 'f32') {
    words.f32[0] = value
    return words.u32[0]
  }
  return dtype === 'i32' ? value >>> 0 : encodeHost(dtype, [value])[0]
}
