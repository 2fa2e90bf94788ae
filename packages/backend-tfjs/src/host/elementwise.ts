/** @file Elementwise primitives on host memory: TensorFlow.js kernels where they are exact, otherwise loops. */
import {
  type BinaryCode,
  type CompareCode,
  type DType,
  type PrimitiveAttrs,
  type Shape,
  sameShape,
  sizeOf,
  type TensorSpec,
  type UnaryCode,
  type Value,
} from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { type Elements, elementsOf, type Host, tfDType } from './memory.ts'
import { broadcastStrides, positions } from './strided.ts'

type Kernel<Attrs> = (host: Host, inputs: readonly Value[], attrs: Attrs, outputs: readonly TensorSpec[]) => TfTensor[]

/** TensorFlow.js kernels that fulfil the contract for f32, including NaN and infinities. */
const unaryKernels: { readonly [C in UnaryCode]?: string } = {
  neg: 'Neg',
  abs: 'Abs',
  exp: 'Exp',
  log: 'Log',
  sqrt: 'Sqrt',
  rsqrt: 'Rsqrt',
  sin: 'Sin',
  cos: 'Cos',
  tanh: 'Tanh',
  sigmoid: 'Sigmoid',
  floor: 'Floor',
}

const signOf = (x: number): number => (x > 0 ? 1 : x < 0 ? -1 : x)

const integerUnary: { readonly [C in UnaryCode]?: (x: number) => number } = {
  neg: x => -x,
  abs: Math.abs,
  sign: signOf,
}

export const unary: Kernel<PrimitiveAttrs['unary']> = (host, [x], { code }, [spec]) => {
  const kernel = unaryKernels[code]
  const size = sizeOf(spec.shape)
  if (spec.dtype === 'f32' && kernel !== undefined && size > 0) return [host.runner.run(kernel, { x: tensorOf(x) })]
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const y = host.view(out)
  const from = elementsOf(host, x)
  const fn = integerUnary[code] ?? signOf
  for (let i = 0; i < size; i++) y[i] = fn(from[i])
  return [out]
}

const binaryKernels: { readonly [C in BinaryCode]?: string } = {
  add: 'Add',
  sub: 'Sub',
  mul: 'Multiply',
  div: 'RealDiv',
  pow: 'Pow',
}

const floatBinary: { readonly [C in BinaryCode]: (a: number, b: number) => number } = {
  add: (a, b) => a + b,
  sub: (a, b) => a - b,
  mul: (a, b) => a * b,
  div: (a, b) => a / b,
  max: (a, b) => (a > b || a !== a ? a : b),
  min: (a, b) => (a < b || a !== a ? a : b),
  pow: (a, b) => a ** b,
}

const integerBinary: { readonly [C in BinaryCode]: (a: number, b: number) => number } = {
  ...floatBinary,
  mul: Math.imul,
  div: (a, b) => (b === 0 ? 0 : a / b),
}

export const binary: Kernel<PrimitiveAttrs['binary']> = (host, [a, b], { code }, [spec]) => {
  const kernel = binaryKernels[code]
  if (spec.dtype === 'f32' && kernel !== undefined && sizeOf(spec.shape) > 0) {
    return [host.runner.run(kernel, { a: tensorOf(a), b: tensorOf(b) })]
  }
  const out = host.output(spec.shape, tfDType(spec.dtype))
  combine(host, a, b, host.view(out), spec.shape, (spec.dtype === 'i32' ? integerBinary : floatBinary)[code])
  return [out]
}

const comparisons: { readonly [C in CompareCode]: (a: number, b: number) => number } = {
  eq: (a, b) => (a === b ? 1 : 0),
  lt: (a, b) => (a < b ? 1 : 0),
  le: (a, b) => (a <= b ? 1 : 0),
}

export const compare: Kernel<PrimitiveAttrs['compare']> = (host, [a, b], { code }, [spec]) => {
  const out = host.output(spec.shape, 'bool')
  combine(host, a, b, host.view(out), spec.shape, comparisons[code])
  return [out]
}

/** `out[i] = fn(a[...], b[...])` with broadcasting. The result is rounded for f32 outputs and wraps for i32 outputs. */
function combine(host: Host, a: Value, b: Value, out: Elements, shape: Shape, fn: (a: number, b: number) => number) {
  const x = elementsOf(host, a)
  const y = elementsOf(host, b)
  const size = out.length
  if (sameShape(a.shape, b.shape)) {
    for (let i = 0; i < size; i++) out[i] = fn(x[i], y[i])
  } else if (y.length === 1) {
    const right = y[0]
    for (let i = 0; i < size; i++) out[i] = fn(x[i], right)
  } else {
    const ix = positions(shape, broadcastStrides(a.shape, shape))
    const iy = positions(shape, broadcastStrides(b.shape, shape))
    for (let i = 0; i < size; i++) out[i] = fn(x[ix[i]], y[iy[i]])
  }
}

export const where: Kernel<PrimitiveAttrs['where']> = (host, [condition, a, b], _, [spec]) => {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  const to = host.view(out)
  const [c, x, y] = [elementsOf(host, condition), elementsOf(host, a), elementsOf(host, b)]
  const index = (value: Value) => positions(spec.shape, broadcastStrides(value.shape, spec.shape))
  const same = sameShape(condition.shape, spec.shape)
  if (same && sameShape(a.shape, spec.shape) && y.length === 1) {
    const other = y[0]
    for (let i = 0; i < to.length; i++) to[i] = c[i] !== 0 ? x[i] : other
  } else {
    const [ic, ix, iy] = [index(condition), index(a), index(b)]
    for (let i = 0; i < to.length; i++) to[i] = c[ic[i]] !== 0 ? x[ix[i]] : y[iy[i]]
  }
  return [out]
}

/** Truncates toward zero and saturates; NaN becomes 0. */
function toInteger(from: Elements, to: Elements, low: number, high: number): void {
  for (let i = 0; i < to.length; i++) {
    const x = from[i]
    to[i] = x >= high ? high : x <= low ? low : x !== x ? 0 : Math.trunc(x)
  }
}

export const cast: Kernel<{ dtype: DType }> = (host, [x], { dtype }, [spec]) => {
  const out = host.output(spec.shape, tfDType(dtype))
  const to = host.view(out)
  const from = elementsOf(host, x)
  if (dtype === 'i32') toInteger(from, to, -(2 ** 31), 2 ** 31 - 1)
  else if (dtype === 'u8') toInteger(from, to, 0, 255)
  else to.set(from)
  return [out]
}

export const fill: Kernel<PrimitiveAttrs['fill']> = (host, _, { value }, [spec]) => {
  const out = host.output(spec.shape, tfDType(spec.dtype))
  host.view(out).fill(value)
  return [out]
}
