/**
 * @file Elements of fewer than 32 bits, two or four per word, the first in the lowest bits. Only kernels that move, cast and compare elements, and products with quantized weights,
 * support them; others work on 32-bit elements.
 */
import { type DType, dtypeBytes, type Shape, sizeOf } from '@moe/core'
import type { Program } from '../commands.ts'
import { type DeviceOps, eachElement } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'

/** Elements per word. */
const perWord = (dtype: DType): number => 4 / dtypeBytes[dtype]

const mask = (dtype: DType): string => `${2 ** (8 * dtypeBytes[dtype]) - 1}u`

/** WGSL: `fn <name>_at(i) -> u32`, the bits of element i of a buffer of words. */
export const readBits = (name: string, dtype: DType): string => {
  const per = perWord(dtype)
  const bits =
    per === 1 ? `${name}[i]` : `(${name}[i / ${per}u] >> (i % ${per}u * ${8 * dtypeBytes[dtype]}u)) & ${mask(dtype)}`
  return `
fn ${name}_at(i: u32) -> u32 { return ${bits}; }`
}

/** An op whose elements are computed independently from their indices. */
interface Computed {
  readonly label: string
  /** The dtype of the inputs. */
  readonly buffers: readonly string[]
  /** WGSL with `fn bits(i: u32) -> u32`, the bits of element i. It may be called for indices after the last element. */
  readonly functions: string
  /** The dtype of the output. */
  readonly dtype: DType
}

/** One thread per word of the output, so that no word is written by two threads. Parameters start at word 1. */
export function compute(
  gpu: DeviceOps,
  { label, buffers, functions, dtype }: Computed,
  inputs: readonly Buffer[],
  y: Buffer,
  shape: Shape,
  parameters: readonly number[],
): void {
  const per = perWord(dtype)
  const each = Array.from({ length: per }, (_, c) => `(bits(i * ${per}u + ${c}u) << ${8 * dtypeBytes[dtype] * c}u)`)
  const program: Program = {
    label: `${label} to ${per}`,
    buffers: [...buffers, 'y* u32'],
    body: `${functions}${eachElement(`  y[i] = ${per === 1 ? 'bits(i)' : each.join(' | ')};`)}`,
  }
  gpu.each(program, [...inputs, y], Math.ceil(sizeOf(shape) / per), parameters)
}

/** Declaration of the output that `put` writes. */
export const putsInto = (dtype: DType): string => (perWord(dtype) === 1 ? 'y* u32' : 'y* atomic<u32>')

/** WGSL: `put(at, bits)` writes element `at` even if other threads write its neighbours: each only changes its own bits of the word, so the order does not matter. */
export const put = (dtype: DType): string => {
  const per = perWord(dtype)
  const store =
    per === 1
      ? 'y[at] = bits;'
      : `
  let shift = at % ${per}u * ${8 * dtypeBytes[dtype]}u;
  atomicAnd(&y[at / ${per}u], ~(${mask(dtype)} << shift));
  atomicOr(&y[at / ${per}u], bits << shift);
`
  return `
fn put(at: u32, bits: u32) {${store}}`
}

/** WGSL: the values of four f8e4m3. */
export const fromF8 = `
fn from_f8(codes: vec4<u32>) -> vec4<f32> {
  let size = codes & vec4<u32>(127u);
  let least = bitcast<vec4<u32>>(vec4<f32>(size) * 0.001953125);
  let usual = (size << vec4<u32>(20u)) + vec4<u32>(120u << 23u);
  let number = select(usual, least, size < vec4<u32>(8u));
  let known = select(number, vec4<u32>(0x7fc00000u), size == vec4<u32>(127u));
  return bitcast<vec4<f32>>(known | ((codes & vec4<u32>(128u)) << vec4<u32>(24u)));
}`

/** WGSL: the nearest f8e4m3, ties to even, saturating at 448. */
export const toF8 = `
fn to_f8(x: f32) -> u32 {
  let word = bitcast<u32>(x);
  let size = word & 0x7fffffffu;
  let sign = (word >> 24u) & 128u;
  if (size > 0x7f800000u) { return 127u; }
  if (size >= 0x43e00000u) { return sign | 126u; }
  if (size < 0x3c800000u) { return sign | u32(round(abs(x) * 512.0)); }
  return sign | (((size + 0x7ffffu + ((size >> 20u) & 1u)) >> 20u) - 960u);
}`

/** WGSL: the nearest bf16, ties to even. */
export const toBf16 = `
fn to_bf16(x: f32) -> u32 {
  let word = bitcast<u32>(x);
  if ((word & 0x7fffffffu) > 0x7f800000u) { return (word >> 16u) | 0x40u; }
  return (word + 0x7fffu + ((word >> 16u) & 1u)) >> 16u;
}`
