/** @file A test case of the backend suite: an op, its inputs and attributes as plain data. */
import type { DType } from '../dtype.ts'
import type { OpAttrs, OpName } from '../ops.ts'
import type { Shape } from '../shape.ts'
import type { Tolerance } from './compare.ts'

/** An input of a case: given values, or random ones seeded by the case's name. */
export interface CaseInput {
  /** Sizes of the axes. */
  readonly shape: Shape
  /** Dtype that the values are encoded to. */
  readonly dtype: DType
  /** All elements, row-major. */
  readonly values?: readonly number[]
  /** Normal numbers (mean 0, standard deviation 1), uniform numbers in [low, high), or integers in low..high-1. */
  readonly random?: 'normal' | 'uniform' | 'integer'
  /** Lower bound of uniform numbers and integers. Default 0. */
  readonly low?: number
  /** Upper bound, exclusive. Default 1. */
  readonly high?: number
}

/** A test case of one op. */
export interface OpCase<Op extends OpName = OpName> {
  /** The op to run. */
  readonly op: Op
  /** What distinguishes the case. Also the seed of random inputs. */
  readonly name: string
  /** Inputs, in the order of the op's contract. */
  readonly inputs: readonly CaseInput[]
  /** Attributes of the op. */
  readonly attrs: OpAttrs[Op]
  /** Output shape, for ops that take it as an argument. */
  readonly outShape?: Shape
  /** Output dtype, for ops that take it as an argument. */
  readonly outDtype?: DType
  /** Tolerance of floats against the f64 reference; integers must be equal. Default `tolerances.elementwise`. */
  readonly tolerance?: Tolerance
  /** Whether to compare gradients too. Default: true if an input is f32 and the op has a gradient. */
  readonly gradient?: boolean
  /** Tolerance of the gradients. Default `tolerances.gradient`. */
  readonly gradientTolerance?: Tolerance
  /** Indices of the outputs to compare. Default: all. */
  readonly compared?: readonly number[]
}

/** Creates a case, with attributes type-checked against the op. */
export function opCase<Op extends OpName>(
  op: Op,
  name: string,
  inputs: readonly CaseInput[],
  attrs: OpAttrs[Op],
  rest: Partial<Omit<OpCase<Op>, 'op' | 'name' | 'inputs' | 'attrs'>> = {},
): OpCase {
  return { op, name, inputs, attrs, ...rest } as unknown as OpCase
}

/** Normally distributed numbers. */
export const f32 = (...shape: number[]): CaseInput => ({ shape, dtype: 'f32', random: 'normal' })
/** Uniform numbers in [low, high). */
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
/** The given numbers. */
export const given = (dtype: DType, shape: Shape, values: readonly number[]): CaseInput => ({ shape, dtype, values })
