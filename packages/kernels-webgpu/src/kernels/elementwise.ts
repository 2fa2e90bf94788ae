/** @file Elementwise ops with one thread per element: arithmetic, comparisons, selection, casts. */
import {
  type BinaryCode,
  bitsOf,
  type CompareCode,
  type DType,
  dtypeBytes,
  isFloat,
  type Kernel,
  type PrimitiveAttrs,
  type UnaryCode,
} from '@moe/core'
import { broadcastNest } from '@moe/core/strides'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement, elementOf, placeInNest } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { exponential, hyperbolic, logarithm, powers, special, trigonometry } from './math.ts'
import { compute, fromF8, readBits, toBf16, toF8 } from './packed.ts'

const unaryFloats: { readonly [C in UnaryCode]: readonly [result: string, ...functions: string[]] } = {
  neg: ['-a'],
  abs: ['abs(a)'],
  sign: ['select(select(f32(a > 0.0) - f32(a < 0.0), 0.0, a == 0.0), a, is_nan(a))', special],
  exp: ['exp_(a)', special, exponential],
  log: ['log_(a)', special, logarithm],
  sqrt: ['select(sqrt(a), a, is_inf(a) && !is_negative(a))', special],
  rsqrt: ['1.0 / sqrt(a)'],
  sin: ['sin_(a)', special, trigonometry],
  cos: ['cos_(a)', special, trigonometry],
  tanh: ['tanh_(a)', special, exponential, hyperbolic],
  sigmoid: ['sigmoid_(a)', special, exponential],
  floor: ['floor(a)'],
}

const unaryIntegers: Partial<Record<UnaryCode, string>> = { neg: '-a', abs: 'abs(a)', sign: 'sign(a)' }

export const unary =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['unary']> =>
  ([x], { code }, [spec]) => {
    const y = gpu.output(code, spec)
    const element = elementOf(spec.dtype)
    const [result, ...functions] = element === 'f32' ? unaryFloats[code] : [unaryIntegers[code] as string]
    const program = {
      label: `${code} ${element}`,
      buffers: [`x ${element}`, `y* ${element}`],
      body: `${functions.join('')}${eachElement(`let a = x[i]; y[i] = ${result};`)}`,
    }
    gpu.each(program, [bufferOf(x), y], countOf(spec))
    return [y]
  }

const binaryFloats: { readonly [C in BinaryCode]: readonly [result: string, ...functions: string[]] } = {
  add: ['l + r'],
  sub: ['l - r'],
  mul: ['l * r'],
  div: ['l / r'],
  max: ['max_(l, r)', special],
  min: ['min_(l, r)', special],
  pow: ['pow_(l, r)', special, exponential, logarithm, powers],
}

// -2^31 / -1 is 2^31, which wraps to -2^31; so do l / 1 and 0 - it.
const divide = `
fn divide(l: i32, r: i32) -> i32 {
  if (r == 0) { return 0; }
  if (r == -1) { return 0 - l; }
  return l / r;
}`

const binaryIntegers: { readonly [C in BinaryCode]: readonly [result: string, ...functions: string[]] } = {
  ...binaryFloats,
  div: ['divide(l, r)', divide],
  max: ['max(l, r)'],
  min: ['min(l, r)'],
}

/** WGSL: the elements of both operands for element i. */
const pair = `
  let rank = p(1u);
  let l = a[place(i, 2u, 2u + rank)];
  let r = b[place(i, 2u, 2u + 2u * rank)];`

export const binary =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['binary']> =>
  ([a, b], { code }, [spec]) => {
    const y = gpu.output(code, spec)
    const element = elementOf(spec.dtype)
    const [result, ...functions] = (element === 'f32' ? binaryFloats : binaryIntegers)[code]
    const program: Program = {
      label: `${code} ${element}`,
      buffers: [`a ${element}`, `b ${element}`, `y* ${element}`],
      body: `${functions.join('')}${placeInNest}${eachElement(`${pair}
  y[i] = ${result};`)}`,
    }
    if (countOf(spec) > 0) {
      gpu.each(program, [bufferOf(a), bufferOf(b), y], countOf(spec), broadcastNest(spec.shape, a.shape, b.shape))
    }
    return [y]
  }

// NaN is detected by its bits, because compilers may assume that there is none.
const comparisons: { readonly [C in CompareCode]: readonly [float: string, integer: string] } = {
  eq: ['select(l == r, false, is_nan(l) || is_nan(r))', 'l == r'],
  lt: ['select(l < r, false, is_nan(l) || is_nan(r))', 'l < r'],
  le: ['select(l <= r, false, is_nan(l) || is_nan(r))', 'l <= r'],
}

export const compare =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['compare']> =>
  ([a, b], { code }, [spec]) => {
    const y = gpu.output(code, spec)
    const element = elementOf(a.dtype)
    const [float, integer] = comparisons[code]
    if (countOf(spec) === 0) return [y]
    const compared = {
      label: `${code} ${element}`,
      buffers: [`a ${element}`, `b ${element}`],
      functions: `${special}${placeInNest}
fn bits(i: u32) -> u32 {${pair}
  return u32(${element === 'f32' ? float : integer});
}`,
      dtype: spec.dtype,
    }
    compute(gpu, compared, [a, b].map(bufferOf), y, spec.shape, broadcastNest(spec.shape, a.shape, b.shape))
    return [y]
  }

const choose: Program = {
  label: 'where',
  // Bits are copied unchanged.
  buffers: ['c u32', 'a u32', 'b u32', 'y* u32'],
  body: `${placeInNest}${readBits('c', 'u8')}${eachElement(`
  let rank = p(1u);
  let first = c_at(place(i, 2u, 2u + rank)) != 0u;
  if (first) { y[i] = a[place(i, 2u, 2u + 2u * rank)]; } else { y[i] = b[place(i, 2u, 2u + 3u * rank)]; }`)}`,
}

export const where =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['where']> =>
  ([condition, a, b], _, [spec]) => {
    const y = gpu.output('where', spec)
    if (countOf(spec) > 0) {
      const nest = broadcastNest(spec.shape, condition.shape, a.shape, b.shape)
      gpu.each(choose, [bufferOf(condition), bufferOf(a), bufferOf(b), y], countOf(spec), nest)
    }
    return [y]
  }

/** WGSL: the value of `stored` bits; floats as f32, integers as i32. */
const decoded: { readonly [D in DType]?: string } = {
  f32: 'bitcast<f32>(stored)',
  bf16: 'bitcast<f32>(stored << 16u)',
  f8e4m3: 'from_f8(vec4<u32>(stored)).x',
  i32: 'bitcast<i32>(stored)',
  u8: 'i32(stored)',
}

/** WGSL: the bits of an f32 `a`. To integers: toward zero, saturating, NaN to 0. */
const fromFloat: { readonly [D in DType]?: string } = {
  f32: 'bitcast<u32>(a)',
  bf16: 'to_bf16(a)',
  f8e4m3: 'to_f8(a)',
  i32: 'bitcast<u32>(select(select(select(i32(a), 2147483647, a >= 2147483648.0), -2147483647 - 1, a <= -2147483648.0), 0, is_nan(a)))',
  u8: 'select(u32(clamp(a, 0.0, 255.0)), 0u, is_nan(a))',
}

/** WGSL: the bits of an i32 `a`. */
const fromInteger: { readonly [D in DType]?: string } = {
  f32: 'bitcast<u32>(f32(a))',
  bf16: 'to_bf16(f32(a))',
  f8e4m3: 'to_f8(f32(a))',
  i32: 'bitcast<u32>(a)',
  u8: 'u32(clamp(a, 0, 255))',
}

export const cast =
  (gpu: DeviceOps): Kernel<{ readonly dtype: DType }> =>
  ([x], _, [spec]) => {
    const { dtype, shape } = spec
    if (x.dtype === dtype) return [gpu.copied('cast', x)]
    const y = gpu.output('cast', spec)
    const program = {
      label: `cast ${x.dtype} ${dtype}`,
      buffers: ['x u32'],
      functions: `${special}${fromF8}${toF8}${toBf16}${readBits('x', x.dtype)}
fn bits(i: u32) -> u32 {
  let stored = x_at(i);
  let a = ${decoded[x.dtype]};
  return ${(isFloat(x.dtype) ? fromFloat : fromInteger)[dtype]};
}`,
      dtype,
    }
    compute(gpu, program, [bufferOf(x)], y, shape, [])
    return [y]
  }

const filled: Program = { label: 'fill', buffers: ['y* u32'], body: eachElement('y[i] = p(1u);') }

/** Sets all elements of y to `value`. */
export function fillAll(gpu: DeviceOps, y: Buffer, dtype: DType, value: number): void {
  const bits = 8 * dtypeBytes[dtype]
  let word = bitsOf(value, dtype)
  for (let shift = bits; shift < 32; shift *= 2) word |= word << shift
  gpu.each(filled, [y], y.bytes / 4, [word])
}

export const fill =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['fill']> =>
  (_, { value }, [spec]) => {
    const y = gpu.output('fill', spec)
    fillAll(gpu, y, spec.dtype, value)
    return [y]
  }
