/** @file Converts arrays between stored dtypes and f32, with shifts and tables instead of a function call per element. */

import { fromF8e4m3, fromF16, toF16 } from '@moe/core'
import type { StoredArray, StoredDType } from './stored-dtype.ts'

/**
 * Converts a stored array to f32. Exact for bf16, f16, 8-bit floats, bool, and integers up to 2^24; f64 and larger integers are rounded
 * to nearest even. f32 is returned without copying.
 *
 * @returns undefined for dtypes whose elements are not single numbers in whole bytes (`c64`, `f4`, `f6e2m3`, `f6e3m2`)
 */
export function toF32(dtype: StoredDType, data: StoredArray): Float32Array | undefined {
  switch (dtype) {
    case 'f32':
      return data as Float32Array
    case 'bf16': {
      const bits = data as Uint16Array
      const out = new Float32Array(bits.length)
      const words = new Uint32Array(out.buffer)
      for (let i = 0; i < bits.length; i++) words[i] = bits[i] << 16
      return out
    }
    case 'f16':
      return lookUp(f16Table(), data as Uint16Array)
    case 'f8e4m3':
      return lookUp(f8e4m3Table(), data as Uint8Array)
    case 'f8e5m2':
      return lookUp(f8e5m2Table(), data as Uint8Array)
    case 'f8e4m3fnuz':
      return lookUp(f8e4m3fnuzTable(), data as Uint8Array)
    case 'f8e5m2fnuz':
      return lookUp(f8e5m2fnuzTable(), data as Uint8Array)
    case 'f8e8m0':
      return lookUp(f8e8m0Table(), data as Uint8Array)
    case 'i64':
    case 'u64':
      return Float32Array.from(data as BigInt64Array, Number)
    case 'f64':
    case 'i32':
    case 'u32':
    case 'i16':
    case 'u16':
    case 'i8':
    case 'u8':
    case 'bool':
      return Float32Array.from(data as Float64Array)
    default:
      return undefined
  }
}

/** Converts f32 to a stored float dtype, rounding to nearest even. f32 is returned without copying. */
export function fromF32(dtype: 'f32' | 'bf16' | 'f16', data: Float32Array): Float32Array | Uint16Array {
  if (dtype === 'f32') return data
  const out = new Uint16Array(data.length)
  const words = new Uint32Array(data.buffer, data.byteOffset, data.length)
  if (dtype === 'f16') {
    for (let i = 0; i < words.length; i++) {
      const bits = words[i]
      const magnitude = bits & 0x7fffffff
      // From the smallest normal f16 to below 65536, rounding only drops mantissa bits.
      if (magnitude >= 0x38800000 && magnitude < 0x47800000) {
        const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1)
        out[i] = ((bits >>> 16) & 0x8000) | ((rounded - 0x38000000) >>> 13)
      } else out[i] = toF16(data[i])
    }
    return out
  }
  for (let i = 0; i < words.length; i++) {
    const bits = words[i]
    // Keep NaN a NaN: rounding could turn it into infinity.
    if ((bits & 0x7fffffff) > 0x7f800000) out[i] = (bits >>> 16) | 0x40
    else out[i] = (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16
  }
  return out
}

function lookUp(table: Float32Array, codes: Uint8Array | Uint16Array): Float32Array {
  const out = new Float32Array(codes.length)
  for (let i = 0; i < codes.length; i++) out[i] = table[codes[i]]
  return out
}

/** Decoded values of all codes of a format, computed on first use. */
function table(codes: number, decode: (code: number) => number): () => Float32Array {
  let values: Float32Array | undefined
  return () => {
    values ??= Float32Array.from({ length: codes }, (_, code) => decode(code))
    return values
  }
}

const f16Table = table(65536, fromF16)

/** The value of each `f8e4m3` byte. */
export const f8e4m3Table = table(256, fromF8e4m3)

/** An `f8e5m2` is the upper byte of an f16. */
const f8e5m2Table = table(256, code => fromF16(code << 8))

/** A float of 8 bits without infinities and negative zero, whose code is NaN, as on AMD's MI300. */
const fnuzTable = (mantissaBits: number, bias: number) =>
  table(256, code => {
    if (code === 0x80) return Number.NaN
    const exponent = (code & 0x7f) >> mantissaBits
    const fraction = (code % 2 ** mantissaBits) + (exponent > 0 ? 2 ** mantissaBits : 0)
    return (code < 0x80 ? 1 : -1) * fraction * 2 ** (Math.max(exponent, 1) - bias - mantissaBits)
  })

const f8e4m3fnuzTable = fnuzTable(3, 8)
const f8e5m2fnuzTable = fnuzTable(2, 16)

/** Powers of two, as in the `ue8m0` scales of DeepSeek-V3.1; 255 is NaN. */
const f8e8m0Table = table(256, code => (code === 255 ? Number.NaN : 2 ** (code - 127)))
