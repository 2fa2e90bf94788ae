/** @file Element types: sizes, host arrays, and bit conversions for the types that JavaScript has no arrays for. */

/**
 * Element type of a tensor. Ops compute in `f32`; the 16- and 8-bit floats are formats for storage and for inputs of
 * matrix products.
 */
export type DType = 'f32' | 'bf16' | 'f16' | 'f8e4m3' | 'i32' | 'u8'

/**
 * Typed array that carries a dtype's elements on the host: raw 16-bit patterns for `bf16` and `f16`, raw bytes for
 * `f8e4m3`.
 */
export type HostArray = Float32Array | Int32Array | Uint16Array | Uint8Array

/** All element types. */
export const dtypes: readonly DType[] = ['f32', 'bf16', 'f16', 'f8e4m3', 'i32', 'u8']

/** Size of one element in bytes, for each dtype. */
export const dtypeBytes: Readonly<Record<DType, number>> = { f32: 4, bf16: 2, f16: 2, f8e4m3: 1, i32: 4, u8: 1 }

/** Returns whether the dtype is a floating-point type. Only tensors of these types are part of gradient recording. */
export const isFloat = (dtype: DType): boolean => dtype !== 'i32' && dtype !== 'u8'

/** Returns a zero-filled host array for `length` elements. */
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

/** Returns a view of the bytes as the host array of `dtype`. Copies only if the byte offset is not aligned. */
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

/** Converts an f32 number to bf16 bits, rounding to nearest even. NaN stays a (quiet) NaN. */
export function toBf16(value: number): number {
  f32Scratch[0] = value
  const bits = u32Scratch[0]
  if ((bits & 0x7fffffff) > 0x7f800000) return ((bits >>> 16) | 0x40) & 0xffff
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff
}

/** Converts bf16 bits to a number, exactly. */
export function fromBf16(bits: number): number {
  u32Scratch[0] = bits << 16
  return f32Scratch[0]
}

/**
 * Converts an f32 number to IEEE binary16 bits, rounding to nearest even. Overflow becomes infinity; subnormals are
 * kept.
 */
export function toF16(value: number): number {
  f32Scratch[0] = value
  const bits = u32Scratch[0]
  const sign = (bits >>> 16) & 0x8000
  const magnitude = bits & 0x7fffffff
  if (magnitude > 0x7f800000) return sign | 0x7e00
  if (magnitude >= 0x47800000) return sign | 0x7c00
  if (magnitude < 0x38800000) {
    // Subnormal half: one unit is 2^-24. Scaling by a power of two is exact, so rounding happens only once.
    const scaled = Math.abs(f32Scratch[0]) * 16777216
    return sign | roundHalfEven(scaled)
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1)
  return sign | ((rounded - 0x38000000) >>> 13)
}

/** Converts IEEE binary16 bits to a number, exactly. */
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

/**
 * Number of consecutive elements along the summed axis that share a scale in precision 'fp8'. In the weight gradient of
 * an expert, the tiles start at the expert's first row.
 */
export const fp8Tile = 128

/**
 * Converts an f32 number to float8_e4m3fn bits, rounding to nearest even and saturating at ±448, as hardware does. NaN
 * stays NaN.
 */
export function toF8e4m3(value: number): number {
  if (Number.isNaN(value)) return 0x7f
  const sign = value < 0 || Object.is(value, -0) ? 0x80 : 0
  const magnitude = Math.abs(value)
  if (magnitude >= f8e4m3Max) return sign | 0x7e
  if (magnitude < 2 ** -6) return sign | roundHalfEven(magnitude * 512)
  const exponent = Math.floor(Math.log2(magnitude))
  const mantissa = roundHalfEven(magnitude * 2 ** (3 - exponent))
  // A mantissa of 16 carries into the exponent; the addition handles that.
  const code = ((exponent + 7) << 3) + (mantissa - 8)
  return sign | Math.min(code, 0x7e)
}

/** Converts float8_e4m3fn bits to a number, exactly. */
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

/** Sets every element of `out` to `convert` of a value. `from(values, convert)` of typed arrays takes 30 times as long. */
function mapTo<A extends HostArray | Uint8ClampedArray>(
  out: A,
  values: ArrayLike<number>,
  convert: (value: number) => number,
): A {
  for (let i = 0; i < out.length; i++) out[i] = convert(values[i])
  return out
}

/** Decodes a host array of any dtype to numbers. f32, i32 and u8 arrays are returned as they are, without a copy. */
export function decodeHost(dtype: DType, data: HostArray): Float32Array | Int32Array | Uint8Array {
  switch (dtype) {
    case 'f32':
      return data as Float32Array
    case 'i32':
      return data as Int32Array
    case 'u8':
      return data as Uint8Array
    default:
      return mapTo(new Float32Array(data.length), data, decoders[dtype])
  }
}

/**
 * Encodes numbers as the host array of a dtype. Integers are truncated toward zero; `u8` is clamped to 0..255. An array
 * that already has the right type is returned as it is.
 */
export function encodeHost(dtype: DType, values: ArrayLike<number>): HostArray {
  switch (dtype) {
    case 'f32':
      return values instanceof Float32Array ? values : Float32Array.from(values)
    case 'i32':
      return values instanceof Int32Array ? values : Int32Array.from(values)
    case 'u8':
      return values instanceof Uint8Array
        ? values
        : new Uint8Array(mapTo(new Uint8ClampedArray(values.length), values, Math.trunc))
    case 'f8e4m3':
      return mapTo(new Uint8Array(values.length), values, toF8e4m3)
    default:
      return mapTo(new Uint16Array(values.length), values, encoders[dtype])
  }
}

const decoders = { bf16: fromBf16, f16: fromF16, f8e4m3: fromF8e4m3 }
const encoders = { bf16: toBf16, f16: toF16 }

const word = new ArrayBuffer(4)
const words = { f32: new Float32Array(word), u32: new Uint32Array(word) }

/**
 * Returns the bits of an element as an unsigned number, the form in which kernels that only move elements take a value.
 */
export function bitsOf(value: number, dtype: DType): number {
  if (dtype === 'f32') {
    words.f32[0] = value
    return words.u32[0]
  }
  return dtype === 'i32' ? value >>> 0 : encodeHost(dtype, [value])[0]
}
