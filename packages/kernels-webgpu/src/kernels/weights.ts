/**
 * @file The right operand of a product, a matrix or one per expert: in f32, or quantized and decoded as it is read. If rows start at words (`wide`), four adjacent values are in one
 * word, half a word (int4) or two (bf16), and share a scale; otherwise every code is read separately, with its scale.
 */
import type { QuantizedAttrs, Value, WeightFormat } from '@moe/core'
import { bufferOf } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { fromF8 } from './packed.ts'
import { areWide, quads, readQuad, repeat } from './quads.ts'

type Scaled = Exclude<WeightFormat, 'bf16'>

export interface Weight {
  readonly format: 'f32' | WeightFormat
  readonly buffers: readonly Buffer[]
  /** Parameters that `weightText` reads. */
  readonly words: readonly number[]
  /** Whether four adjacent values can be read together. */
  readonly wide: boolean
}

/** A matrix stored by rows in f32 (or bf16): rows are `pitch` elements apart, starting at `start`, and matrices `apart` elements. */
export interface Placed {
  readonly buffer: Buffer
  readonly pitch: number
  readonly start?: number
  readonly apart?: number
}

const placedWords = ({ pitch, start = 0, apart = 0 }: Placed) => [pitch, start, apart]

export const plain = (placed: Placed): Weight => {
  const words = placedWords(placed)
  return { format: 'f32', buffers: [placed.buffer], words, wide: areWide(...words) }
}

/** A quantized weight `[N, K]` or `[E, N, K]`. */
export function stored(q: Value, scale: Value | undefined, { format, block, columns }: QuantizedAttrs): Weight {
  const [rows, pitch] = q.shape.slice(-2)
  const wide = areWide(columns)
  const words = [pitch, 0, rows * pitch]
  if (scale === undefined) return { format, buffers: [bufferOf(q)], words, wide }
  const [down, across] = scale.shape.slice(-2)
  return {
    format,
    buffers: [bufferOf(q), bufferOf(scale)],
    words: [...words, ...block, across, down * across],
    wide: wide && areWide(block[1]),
  }
}

/** WGSL that reads a weight as `w`. */
export interface WeightText {
  readonly buffers: readonly string[]
  readonly functions: string
  /** The offset of row `at` of a matrix, for `w4(row, i, size) -> vec4<f32>`; see `readQuad`. */
  row(at: string, matrix: string): string
}

/** WGSL of the values of four codes. */
const values: Readonly<Record<Scaled, string>> = {
  fp8: 'from_f8(codes)',
  int8: '(vec4<f32>(codes) - 128.0)',
  int4: '(vec4<f32>(codes) - 8.0)',
}

/** `start`: the byte at which a row begins, and its first scale. */
function readScaled(format: Scaled, wide: boolean, scaleColumns: string): string {
  const [bits, byte] = format === 'int4' ? [4, (i: string) => `(${i}) / 2u`] : [8, (i: string) => i]
  const mask = `${2 ** bits - 1}u`
  const functions = format === 'fp8' ? fromF8 : ''
  if (wide) {
    const shifts = [0, 1, 2, 3].map(c => `${c * bits}u`)
    return `${functions}
fn w4(start: vec2<u32>, i: u32, size: u32) -> vec4<f32> {
  if (i >= size) { return vec4<f32>(); }
  let byte = start.x + ${byte('i')};
  let word = w[byte / 4u]${bits === 4 ? ' >> (byte % 4u * 8u)' : ''};
  let codes = (vec4<u32>(word) >> vec4<u32>(${shifts})) & vec4<u32>(${mask});
  return ${values[format]} * scales[start.y + i / ${scaleColumns}];
}`
  }
  return `${functions}
fn w4(start: vec2<u32>, i: u32, size: u32) -> vec4<f32> {
  var codes = vec4<u32>();
  var factors = vec4<f32>();${repeat(
    4,
    c => `
  if (i + ${c}u < size) {
    let byte = start.x + ${byte(`i + ${c}u`)};
    codes[${c}] = (w[byte / 4u] >> (byte % 4u * 8u${bits === 4 ? ` + (i + ${c}u) % 2u * 4u` : ''})) & ${mask};
    factors[${c}] = scales[start.y + (i + ${c}u) / ${scaleColumns}];
  }`,
  )}
  return ${values[format]} * factors;
}`
}

/** Its words start at `first`. */
export function weightText(format: Weight['format'], wide: boolean, first: number): WeightText {
  const [pitch, start, apart, blockRows, blockColumns, across, scalesApart] = [0, 1, 2, 3, 4, 5, 6].map(
    i => `p(${first + i}u)`,
  )
  const begin = (at: string, matrix: string) => `${start} + ${matrix} * ${apart} + ${at} * ${pitch}`
  if (format === 'f32' || format === 'bf16') {
    return { buffers: [quads('w', wide, format)], functions: readQuad('w', wide, format), row: begin }
  }
  return {
    buffers: ['w u32', 'scales f32'],
    functions: readScaled(format, wide, blockColumns),
    row: (at, matrix) =>
      `vec2<u32>(${begin(at, matrix)}, ${matrix} * ${scalesApart} + ${at} / ${blockRows} * ${across})`,
  }
}
