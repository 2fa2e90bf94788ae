/** @file Elementwise primitives as TensorFlow.js kernels, with extra code for the contract's rules on NaN, integers and saturation. */
import type { BinaryCode, CompareCode, DType, PrimitiveAttrs, TensorSpec, UnaryCode, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { type Device, type Ops, tfDType } from './ops.ts'

type Kernel<Attrs> = (
  device: Device,
  op: Ops,
  inputs: readonly Value[],
  attrs: Attrs,
  outputs: readonly TensorSpec[],
) => TfTensor[]

const unaryKernels: { readonly [C in UnaryCode]: string } = {
  neg: 'Neg',
  abs: 'Abs',
  sign: 'Sign',
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

export const unary: Kernel<PrimitiveAttrs['unary']> = ({ runner, syncReads }, op, [value], { code }, [spec]) => {
  const x = tensorOf(value)
  if (spec.dtype === 'i32' && code === 'sign') return [signOfIntegers(op, x)]
  const y = runner.run(unaryKernels[code], { x })
  // Without synchronous reads nothing can be tested, and Sigmoid may lose NaN, as it does on webgpu.
  const loses = code === 'sign' || (code === 'sigmoid' && !syncReads)
  return loses ? [op.select(op.isNaN(x), x, y, spec.shape)] : [y]
}

/** (0 < x) - (x < 0), because not every Sign kernel supports integers. */
function signOfIntegers(op: Ops, x: TfTensor): TfTensor {
  const zero = op.scalar(0, 'int32')
  return op.sub(op.cast(op.less(zero, x), 'int32'), op.cast(op.less(x, zero), 'int32'))
}

const arithmetic: { readonly [C in BinaryCode]?: string } = {
  add: 'Add',
  sub: 'Sub',
  mul: 'Multiply',
  div: 'RealDiv',
  pow: 'Pow',
}

export const binary: Kernel<PrimitiveAttrs['binary']> = (device, op, inputs, { code }, [spec]) => {
  const [a, b] = inputs.map(tensorOf)
  if (code === 'div' && spec.dtype === 'i32') return [divideIntegers(device, op, a, b, spec)]
  if (code === 'max' || code === 'min') return [extreme(device, op, a, b, code, spec)]
  return [device.runner.run(arithmetic[code] as string, { a, b })]
}

function extreme(device: Device, op: Ops, a: TfTensor, b: TfTensor, code: 'max' | 'min', spec: TensorSpec): TfTensor {
  const y = device.runner.run(code === 'max' ? 'Maximum' : 'Minimum', { a, b })
  if (spec.dtype === 'i32' || device.maximumKeepsNaN) return y
  // a + b is NaN if either operand is, and is not used otherwise.
  const bad = device.runner.run('LogicalOr', { a: op.isNaN(a), b: op.isNaN(b) })
  return op.select(bad, op.add(a, b), y, spec.shape)
}

/** Truncating division; 0 if the divisor is 0. Divisors 0 and -1 never reach the kernel, because both can crash the process. */
function divideIntegers({ runner }: Device, op: Ops, a: TfTensor, b: TfTensor, { shape }: TensorSpec): TfTensor {
  const [zero, one, minus] = [0, 1, -1].map(value => op.scalar(value, 'int32'))
  const byZero = op.equal(b, zero)
  const byMinus = op.equal(b, minus)
  const tame = op.select(byZero, one, op.select(byMinus, one, b, b.shape), b.shape)
  const floor = runner.run('FloorDiv', { a, b: tame })
  const inexact = op.notEqual(op.mul(floor, tame), a)
  const up = op.and(inexact, op.less(floor, zero))
  const quotient = op.add(floor, op.cast(up, 'int32'))
  const negated = op.select(byMinus, op.sub(zero, a), quotient, shape)
  return op.select(byZero, zero, negated, shape)
}

const comparisons: { readonly [C in CompareCode]: string } = { eq: 'Equal', lt: 'Less', le: 'LessEqual' }

export const compare: Kernel<PrimitiveAttrs['compare']> = ({ runner }, _, inputs, { code }) => {
  const [a, b] = inputs.map(tensorOf)
  return [runner.run(comparisons[code], { a, b })]
}

export const where: Kernel<PrimitiveAttrs['where']> = (_, op, inputs, __, [spec]) => {
  const [condition, a, b] = inputs.map(tensorOf)
  return [op.select(op.cast(condition, 'bool'), a, b, spec.shape)]
}

export const cast: Kernel<{ dtype: DType }> = (_, op, [x], { dtype }, [{ shape }]) => {
  const from = tensorOf(x)
  if (dtype === 'f32') return [op.cast(from, 'float32')]
  if (x.dtype === 'f32')
    return [saturate(op, from, dtype === 'u8' ? 0 : -(2 ** 31), dtype === 'u8' ? 255 : 2 ** 31 - 1, shape)]
  const integers = op.cast(from, 'int32')
  return [dtype === 'u8' && x.dtype === 'i32' ? clampIntegers(op, integers, shape) : integers]
}

/** f32 to integers: NaN becomes 0; saturates and truncates. Only numbers in range reach the kernel. */
function saturate(op: Ops, x: TfTensor, low: number, high: number, shape: readonly number[]): TfTensor {
  // 2^31 - 1 rounds to 2^31 in f32, so values that are not below it take the integer directly.
  const bound = op.scalar(high === 255 ? 256 : 2 ** 31, 'float32')
  const tooHigh = op.lessEqual(bound, x)
  const tooLow = op.lessEqual(x, op.scalar(low, 'float32'))
  const zero = op.scalar(0, 'float32')
  const inside = op.and(op.less(x, bound), op.less(op.scalar(low, 'float32'), x))
  const integers = op.cast(op.select(inside, x, zero, shape), 'int32')
  const below = op.select(tooLow, op.scalar(low, 'int32'), integers, shape)
  return op.select(tooHigh, op.scalar(high, 'int32'), below, shape)
}

function clampIntegers(op: Ops, x: TfTensor, shape: readonly number[]): TfTensor {
  const [zero, top] = [op.scalar(0, 'int32'), op.scalar(255, 'int32')]
  return op.select(op.less(x, zero), zero, op.select(op.less(top, x), top, x, shape), shape)
}

export const fill: Kernel<PrimitiveAttrs['fill']> = (_, op, __, { value }, [{ shape, dtype }]) => {
  if (shape.length === 0) return [op.scalar(value, tfDType(dtype))]
  return [op.fill(shape, value, tfDType(dtype))]
}
