/** @file Shapes, and arithmetic on shapes and axes, independent of tensors. */
import { MoeError } from './errors.ts'

/** Sizes of the axes, outermost first; `[]` is a scalar. */
export type Shape = readonly number[]

/** Returns the number of elements. */
export function sizeOf(shape: Shape): number {
  let size = 1
  for (let i = 0; i < shape.length; i++) size *= shape[i]
  return size
}

/** Returns whether both shapes are identical. No broadcasting. */
export function sameShape(a: Shape, b: Shape): boolean {
  if (a === b) return true
  if (a.length !== b.length) return false
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false
  return true
}

/** Formats a shape for messages: `[2,3]`. */
export const showShape = (shape: Shape): string => `[${shape.join(',')}]`

/** Returns the shape that two shapes broadcast to by NumPy's rules. @throws MoeError E_SHAPE if they do not */
export function broadcastShapes(op: string, a: Shape, b: Shape): Shape {
  if (sameShape(a, b)) return a
  const rank = Math.max(a.length, b.length)
  const out = new Array<number>(rank)
  for (let i = 1; i <= rank; i++) {
    const sizeA = i <= a.length ? a[a.length - i] : 1
    const sizeB = i <= b.length ? b[b.length - i] : 1
    if (sizeA !== sizeB && sizeA !== 1 && sizeB !== 1) {
      throw new MoeError({
        code: 'E_SHAPE',
        op,
        problem: `shapes do not broadcast, lhs ${showShape(a)} rhs ${showShape(b)}: ${sizeA} != ${sizeB}`,
        fix: 'counting axes from the right, make the sizes equal or one of them 1',
        details: { lhs: a, rhs: b },
      })
    }
    out[rank - i] = sizeA === 1 ? sizeB : sizeA
  }
  return out
}

/** Converts an axis that may count from the end to one in 0..rank-1. */
export function normalizeAxis(op: string, axis: number, rank: number): number {
  const normal = axis < 0 ? axis + rank : axis
  if (!Number.isInteger(axis) || normal < 0 || normal >= rank) {
    throw new MoeError({
      code: 'E_ATTR',
      op,
      problem: `axis ${axis} does not exist in a tensor of rank ${rank}`,
      fix: `pass an axis from ${-rank} to ${rank - 1}`,
      details: { axis, rank },
    })
  }
  return normal
}

/** Returns row-major strides, in elements. */
export function stridesOf(shape: Shape): number[] {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= shape[i]
  }
  return strides
}
