/** @file Converts between f32 and the element types of GGUF. `q8_0` and `q4_0` match ggml-quants.c bit for bit (`quantize_row_*_ref`). */

import { fromF16, toF16 } from '@moe/core'
import { fromF32, toF32 } from '../to-f32.ts'
import { type GgufEncoding, type GgufTensorType, layoutOf } from './tensor-type.ts'

/** Elements of a block of `q8_0` and `q4_0`. */
const BLOCK = 32

/**
 * Encodes whole blocks.
 *
 * @param values a multiple of the block size
 * @throws {RangeError} for values that the type cannot represent: magnitudes of 65520 and above in `f16`; in quantized blocks, values
 *   that are not finite or need a scale beyond f16
 */
export function encodeGguf(type: GgufEncoding, values: Float32Array): Uint8Array {
  switch (type) {
    case 'q8_0':
      return encodeBlocks(type, values, encodeQ8)
    case 'q4_0':
      return encodeBlocks(type, values, encodeQ4)
    case 'f16':
      refuseBeyondF16(values)
      return bytesOf(fromF32(type, values))
    default:
      return bytesOf(fromF32(type, values))
  }
}

/** Decodes blocks. Undefined for types that this package does not decode. `bytes` must be aligned to an element. */
export function decodeGguf(type: GgufTensorType, bytes: Uint8Array): Float32Array | undefined {
  switch (type) {
    case 'f32':
      return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
    case 'f16':
    case 'bf16':
      return toF32(type, new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2))
    case 'q8_0':
      return decodeBlocks(type, bytes, (block, out) => {
        const scale = scaleOf(block)
        for (let i = 0; i < BLOCK; i++) out[i] = scale * ((block[2 + i] << 24) >> 24)
      })
    case 'q4_0':
      return decodeBlocks(type, bytes, (block, out) => {
        const scale = scaleOf(block)
        for (let i = 0; i < BLOCK / 2; i++) {
          out[i] = scale * ((block[2 + i] & 15) - 8)
          out[i + BLOCK / 2] = scale * ((block[2 + i] >> 4) - 8)
        }
      })
    default:
      return undefined
  }
}

/** Finite magnitudes of 65520 and above would become infinite. Infinities are allowed. */
function refuseBeyondF16(values: Float32Array): void {
  for (let i = 0; i < values.length; i++) {
    const magnitude = Math.abs(values[i])
    if (magnitude >= 65520 && magnitude < Infinity) throw new RangeError(`${values[i]} does not fit into f16`)
  }
}

/** Maps the largest magnitude to 127. A block is an f16 scale and 32 signed bytes; halves round away from zero. */
function encodeQ8(values: Float32Array, at: number, out: Uint8Array, to: number): void {
  let largest = 0
  for (let i = 0; i < BLOCK; i++) {
    const magnitude = Math.abs(values[at + i])
    // A NaN becomes `largest` and stays there, so that the check of the scale finds it.
    if (magnitude > largest || Number.isNaN(magnitude)) largest = magnitude
  }
  const scale = Math.fround(largest / 127)
  const inverse = scale === 0 ? 0 : Math.fround(1 / scale)
  putScale(scale, out, to)
  for (let i = 0; i < BLOCK; i++) {
    const x = Math.fround(values[at + i] * inverse)
    out[to + 2 + i] = (x < 0 ? x - 0.5 : x + 0.5) | 0
  }
}

/** Maps the value of largest magnitude, with its sign, to -8. A block is an f16 scale and 16 bytes: element i in the low bits, i + 16 in the high bits. */
function encodeQ4(values: Float32Array, at: number, out: Uint8Array, to: number): void {
  let largest = 0
  let extreme = 0
  for (let i = 0; i < BLOCK; i++) {
    const value = values[at + i]
    const magnitude = Math.abs(value)
    if (magnitude > largest || Number.isNaN(magnitude)) {
      largest = magnitude
      extreme = value
    }
  }
  const scale = Math.fround(extreme / -8)
  const inverse = scale === 0 ? 0 : Math.fround(1 / scale)
  putScale(scale, out, to)
  const code = (value: number) => Math.min(15, Math.fround(Math.fround(value * inverse) + 8.5) | 0)
  for (let i = 0; i < BLOCK / 2; i++) {
    out[to + 2 + i] = code(values[at + i]) | (code(values[at + i + BLOCK / 2]) << 4)
  }
}

function putScale(scale: number, out: Uint8Array, to: number): void {
  const bits = toF16(scale)
  if ((bits & 0x7c00) === 0x7c00) throw new RangeError('a value is not finite, or too large for an f16 scale')
  out[to] = bits
  out[to + 1] = bits >> 8
}

const scaleOf = (block: Uint8Array): number => fromF16(block[0] | (block[1] << 8))

function encodeBlocks(
  type: GgufEncoding,
  values: Float32Array,
  encode: (values: Float32Array, at: number, out: Uint8Array, to: number) => void,
): Uint8Array {
  const { bytes } = layoutOf(type)
  const blocks = values.length / BLOCK
  const out = new Uint8Array(blocks * bytes)
  for (let block = 0; block < blocks; block++) encode(values, block * BLOCK, out, block * bytes)
  return out
}

function decodeBlocks(
  type: GgufEncoding,
  bytes: Uint8Array,
  decode: (block: Uint8Array, out: Float32Array) => void,
): Float32Array {
  const { bytes: size } = layoutOf(type)
  const blocks = bytes.length / size
  const out = new Float32Array(blocks * BLOCK)
  for (let block = 0; block < blocks; block++) {
    decode(bytes.subarray(block * size, (block + 1) * size), out.subarray(block * BLOCK, (block + 1) * BLOCK))
  }
  return out
}

const bytesOf = (array: Float32Array | Uint16Array): Uint8Array =>
  new Uint8Array(array.buffer, array.byteOffset, array.byteLength)
