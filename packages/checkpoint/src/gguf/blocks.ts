/** @file f32 to the element types of GGUF and back; `q8_0` and `q4_0` bit for bit as ggml-quants.c does (`quantize_row_*_ref`). */

import { fromF16, toF16 } from '@moe/core'
import { fromF32, toF32 } from '../to-f32.ts'
import { type GgufEncoding, type GgufTensorType, layoutOf } from './tensor-type.ts'

/** Elements of a block of `q8_0` and `q4_0`. */
const BLOCK = 32

/**
 * Encodes whole blocks.
 *
 * @param values as many as fill whole blocks
 * @throws {RangeError} for values that the type cannot hold: in `f16` from 65520 on, in blocks what is not finite or needs a
 *   scale beyond f16
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

/** Values of encoded blocks; undefined for types that this package does not decode. `bytes` must be aligned to an element. */
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

/** Values from 65520 on would become infinite; those that are stay so. */
function refuseBeyondF16(values: Float32Array): void {
  for (let i = 0; i < values.length; i++) {
    const magnitude = Math.abs(values[i])
    if (magnitude >= 65520 && magnitude < Infinity) throw new RangeError(`${values[i]} does not fit into f16`)
  }
}

/** Largest magnitude becomes 127: a scale of f16, then 32 signed bytes, halves rounded away from zero. */
function encodeQ8(values: Float32Array, at: number, out: Uint8Array, to: number): void {
  let largest = 0
  for (let i = 0; i < BLOCK; i++) {
    const magnitude = Math.abs(values[at + i])
    // A NaN must not pass unseen: it wins, stays, and ends up in the scale.
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

/** The value of largest magnitude, sign included, becomes -8: a scale of f16, then 16 bytes, element i low and i + 16 high. */
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
  if ((bits & 0x7c00) === 0x7c00) throw new RangeError('a value is not finite, or too large for a scale in f16')
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
