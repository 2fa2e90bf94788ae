/** @file For backends: merging axes, so that kernels need as few nested loops as possible. */
import { type Shape, sameShape, sizeOf, stridesOf } from './shape.ts'

export { stridesOf as rowMajor }

/** The merged axes, and the stride of each operand (in elements) along each of them. Has at least one axis. */
export interface Nest {
  /** Size of each merged axis, outermost first. */
  readonly sizes: number[]
  /** `strides[operand][axis]`; 0 along axes that the operand is broadcast over. */
  readonly strides: number[][]
}

/** Drops axes of size 1 and merges adjacent axes that are contiguous in every operand. */
export function mergeAxes(sizes: readonly number[], strides: ReadonlyArray<readonly number[]>): Nest {
  const merged: number[] = []
  const kept: number[][] = strides.map(() => [])
  for (let axis = 0; axis < sizes.length; axis++) {
    const size = sizes[axis]
    if (size === 1) continue
    const last = merged.length - 1
    if (last >= 0 && strides.every((stride, k) => kept[k][last] === stride[axis] * size)) {
      merged[last] *= size
      for (let k = 0; k < strides.length; k++) kept[k][last] = strides[k][axis]
    } else {
      merged.push(size)
      for (let k = 0; k < strides.length; k++) kept[k].push(strides[k][axis])
    }
  }
  if (merged.length === 0) {
    merged.push(1)
    for (const stride of kept) stride.push(1)
  }
  return { sizes: merged, strides: kept }
}

/** Returns the strides of a tensor of shape `from` that is broadcast to `out`: 0 along repeated axes. */
export function broadcastStrides(from: Shape, out: Shape): number[] {
  const strides = new Array<number>(out.length).fill(0)
  let stride = 1
  for (let i = 1; i <= from.length; i++) {
    const size = from[from.length - i]
    if (size !== 1) strides[out.length - i] = stride
    stride *= size
  }
  return strides
}

/**
 * Returns the kernel arguments of an elementwise op with NumPy broadcasting: rank, sizes, then the strides of each
 * operand.
 */
export function broadcastNest(out: Shape, ...operands: readonly Shape[]): number[] {
  const usual = operands.length === 2 ? usualNest(out, operands[0], operands[1]) : undefined
  if (usual !== undefined) return usual
  const { sizes, strides } = mergeAxes(
    out,
    operands.map(shape => broadcastStrides(shape, out)),
  )
  return [sizes.length, ...sizes, ...strides.flat()]
}

/**
 * A fast path of `broadcastNest` without intermediate lists for the most common pairs: equal shapes, or one side a
 * scalar, a row or a column of the other.
 */
function usualNest(out: Shape, a: Shape, b: Shape): number[] | undefined {
  const total = sizeOf(out)
  const wholeA = sameShape(a, out)
  const wholeB = sameShape(b, out)
  if (wholeA && wholeB) return [1, total, 1, 1]
  if (!wholeA && !wholeB) return undefined
  const small = wholeA ? b : a
  const size = sizeOf(small)
  if (size === 1) return wholeA ? [1, total, 1, 0] : [1, total, 0, 1]
  if (size === 0) return undefined
  const rest = total / size
  if (isRow(small, out)) return wholeA ? [2, rest, size, size, 1, 0, 1] : [2, rest, size, 0, 1, size, 1]
  if (isColumn(small, out)) return wholeA ? [2, size, rest, rest, 1, 1, 0] : [2, size, rest, 1, 0, rest, 1]
  return undefined
}

/** Returns whether the trailing axes equal those of `out` and all others are missing or 1. */
function isRow(small: Shape, out: Shape): boolean {
  const ahead = out.length - small.length
  let axis = small.length - 1
  while (axis >= 0 && small[axis] === out[ahead + axis]) axis--
  while (axis >= 0 && small[axis] === 1) axis--
  return axis < 0
}

/** Returns whether the leading axes equal those of `out` and all others are 1. */
function isColumn(small: Shape, out: Shape): boolean {
  if (small.length !== out.length) return false
  let axis = 0
  while (axis < small.length && small[axis] === out[axis]) axis++
  while (axis < small.length && small[axis] === 1) axis++
  return axis === small.length
}
