/** @file Arithmetic on shapes and axes: pure functions that know nothing of tensors. */
import type { Shape } from './backend.ts'
import { MoeError } from './errors.ts'

/** Number of elements. */
export function sizeOf(shape: Shape): number {
  let size = 1
  for (let i = 0; i < shape.length; i++) size *= shape[i]
  return size
}

/** Whether both have the same axes of the same sizes; there is no broadcasting. */
export function sameShape(a: Shape, b: Shape): boolean {
  if (a === b) return true
  if (a.length !== b.length) return false
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false
  return true
}

/** `[2,3]`: how shapes are written in messages. */
export const showShape = (shape: Shape): string => `[${shape.join(',')}]`

/** Numpy broadcasting of two shapes. */
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
        fix: 'make the sizes equal or one of them 1, counting axes from the right',
        details: { lhs: a, rhs: b },
      })
    }
    out[rank - i] = sizeA === 1 ? sizeB : sizeA
  }
  return out
}

/** Axis in 0..rank-1 from one that may count from the end. */
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

/** Row-major strides in elements. */
export function stridesOf(shape: Shape): number[] {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= shape[i]
  }
  return strides
}
