/** @file What a step of a random program may read, and random choices that fit it. */
import type { DType } from '../../dtype.ts'
import type { Random } from '../../random.ts'
import { type Shape, sizeOf } from '../../shape.ts'
import type { Tensor } from '../../tensor.ts'

/** What a step may use of the run that it is part of. */
export interface StepContext {
  /** Draws the step's choices, which depend only on the step and on the shapes of its inputs. */
  readonly random: Random
  /** Element types that the program may use. */
  readonly dtypes: ReadonlySet<DType>
  /** Whether `checkpoint` and `withRecomputed` recompute. */
  readonly recompute: boolean
  /** Returns a tensor of the program. */
  pick(): Tensor
  /** Returns a trainable parameter of normal numbers, the same one each time the step runs. */
  parameter(shape: Shape): Tensor
  /** Returns a constant of integers in low..high-1, the same one each time the step runs. */
  integers(shape: Shape, low: number, high: number): Tensor
  /** Runs the step's own steps on these tensors and returns their results. They may also read other tensors. */
  body(inputs: readonly Tensor[]): Tensor[]
}

/** Runs a step. Returns its results. */
export type StepFunction = (c: StepContext) => Tensor | readonly Tensor[]

const sizes = [0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 130]
/** Maximum number of elements of a parameter. */
export const maxSize = 3000

/** One of the list, at random. */
export const one = <T>({ random }: StepContext, from: readonly T[]): T => from[random.integer(from.length)]
export const size = (c: StepContext) => one(c, sizes)
/** A size that is rarely 0. */
export const count = (c: StepContext) => size(c) || size(c)
/** True or false, at random. */
export const flip = ({ random }: StepContext) => random.integer(2) === 1
/** An integer in 0..n-1. */
export const below = ({ random }: StepContext, n: number) => random.integer(n)

/** A shape of the given rank, by default 0 to 4. */
export function randomShape(c: StepContext, rank = c.random.integer(5)): number[] {
  for (;;) {
    const shape = Array.from({ length: rank }, () => size(c))
    if (sizeOf(shape) <= maxSize) return shape
  }
}

/** The tensor as `[rows, features]`. */
export function matrix(x: Tensor): Tensor {
  const features = x.rank === 0 ? 1 : x.shape[x.rank - 1]
  return x.reshape([features === 0 ? (x.rank === 2 ? x.shape[0] : 0) : x.size / features, features])
}

/** The tensor as `[rows, features]`, with at least one feature. */
export function rows(c: StepContext): Tensor {
  const x = matrix(c.pick())
  return x.shape[1] === 0 ? c.parameter([x.shape[0], 3]) : x
}

/** A tensor of this shape: one of the program's if there is one, or a parameter. */
export function like(c: StepContext, shape: Shape): Tensor {
  const x = c.pick()
  if (sizeOf(shape) === x.size && flip(c)) return x.reshape(shape)
  return c.parameter(shape)
}

/** Some of the tensor's axes. */
export function axesOf(c: StepContext, x: Tensor): number[] {
  return x.shape.flatMap((_, axis) => (flip(c) ? [axis] : []))
}

/** Sizes whose product is n. */
export function factors(c: StepContext, n: number): number[] {
  if (n === 0) return [2, 0]
  const shape: number[] = []
  for (let left = n; left > 1; ) {
    const divisors = [2, 3, 4, 5, 8, 16, left].filter(d => left % d === 0)
    const by = one(c, divisors)
    shape.push(by)
    left /= by
  }
  c.random.shuffle(shape)
  while (shape.length > 4) shape.push((shape.pop() as number) * (shape.pop() as number))
  if (flip(c)) shape.splice(below(c, shape.length + 1), 0, 1)
  return shape
}

/** A tensor that broadcasts with x. */
export function partner(c: StepContext, x: Tensor): Tensor {
  const other = c.pick()
  if (other.rank <= x.rank && other.shape.every((n, i) => n === x.shape[x.rank - other.rank + i] || n === 1))
    return other
  const shape = x.shape.map(n => (flip(c) ? n : 1)).slice(below(c, x.rank + 1))
  return like(c, shape)
}
