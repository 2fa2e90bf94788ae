/** @file A test case of the backend suite: an op, its inputs and attributes as plain data. */
import type { OpAttrs, OpName, Shape } from '../backend.ts'
import type { DType } from '../dtype.ts'
import type { Tolerance } from './compare.ts'

/** An input: given values, or random ones (the seed is the case's name). */
export interface CaseInput {
  /** Sizes of the axes. */
  readonly shape: Shape
  /** The op's inputs are encoded to it. */
  readonly dtype: DType
  /** All elements, row-major. */
  readonly values?: readonly number[]
  /** Normal (mean 0, deviation 1), uniform in low..high, or integers in low..high-1. */
  readonly random?: 'normal' | 'uniform' | 'integer'
  /** Lower end of uniform numbers and integers. Default 0. */
  readonly low?: number
  /** Upper end, which is not reached. Default 1. */
  readonly high?: number
}

/** What one check of an op is made of. */
export interface OpCase<Op extends OpName = OpName> {
  /** The op that is run. */
  readonly op: Op
  /** What is special about it. */
  readonly name: string
  /** In the order of the op's contract. */
  readonly inputs: readonly CaseInput[]
  /** Attributes of the op. */
  readonly attrs: OpAttrs[Op]
  /** Output shape of ops that are told it. */
  readonly outShape?: Shape
  /** Output dtype of ops that are told it. */
  readonly outDtype?: DType
  /** Of the values, against the f64 reference. Default `tolerances.elementwise`. */
  readonly tolerance?: Tolerance
  /** Compare gradients too: default true when an input is f32 and the op has a gradient. */
  readonly gradient?: boolean
  /** Of the gradients. Default `tolerances.gradient`. */
  readonly gradientTolerance?: Tolerance
  /** Outputs that are compared; default all. */
  readonly compared?: readonly number[]
}

/** Writes a case with its attributes checked against the op. */
export function opCase<Op extends OpName>(
  op: Op,
  name: string,
  inputs: readonly CaseInput[],
  attrs: OpAttrs[Op],
  rest: Partial<Omit<OpCase<Op>, 'op' | 'name' | 'inputs' | 'attrs'>> = {},
): OpCase {
  return { op, name, inputs, attrs, ...rest } as unknown as OpCase
}

/** Normal numbers. */
export const f32 = (...shape: number[]): CaseInput => ({ shape, dtype: 'f32', random: 'normal' })
/** Numbers in low..high. */
export const uniform = (low: number, high: number, ...shape: number[]): CaseInput => ({
  shape,
  dtype: 'f32',
  random: 'uniform',
  low,
  high,
})
/** Integers in low..high-1. */
export const i32 = (low: number, high: number, ...shape: number[]): CaseInput => ({
  shape,
  dtype: 'i32',
  random: 'integer',
  low,
  high,
})
/** Zeros and ones. */
export const mask = (...shape: number[]): CaseInput => ({ shape, dtype: 'u8', random: 'integer', low: 0, high: 2 })
/** Given numbers. */
export const given = (dtype: DType, shape: Shape, values: readonly number[]): CaseInput => ({ shape, dtype, values })
