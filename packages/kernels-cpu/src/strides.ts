/** @file Merging of axes, so that kernels see as few loops as possible. */
import type { Shape } from '@moe/core'

/** Sizes of the merged axes, and for each operand its stride (in elements) along each of them. At least one axis. */
export interface Nest {
  readonly sizes: number[]
  readonly strides: number[][]
}

/** Drops axes of size 1 and merges neighbours that every operand walks through without a jump. */
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

/** Row-major strides in elements. */
export function rowMajor(shape: Shape): number[] {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    strides[axis] = stride
    stride *= shape[axis]
  }
  return strides
}

/** Strides of a tensor of shape `from` as it is broadcast to `out`: 0 along repeated axes. */
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

/** The arguments rank, sizes, strides of each operand, of an elementwise op with numpy broadcasting. */
export function broadcastNest(out: Shape, ...operands: readonly Shape[]): number[] {
  if (operands.every(shape => sameSizes(shape, out))) {
    let total = 1
    for (const size of out) total *= size
    return operands.length === 2 ? [1, total, 1, 1] : [1, total, ...operands.map(() => 1)]
  }
  const { sizes, strides } = mergeAxes(
    out,
    operands.map(shape => broadcastStrides(shape, out)),
  )
  return [sizes.length, ...sizes, ...strides.flat()]
}

function sameSizes(a: Shape, b: Shape): boolean {
  if (a.length !== b.length) return false
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false
  return true
}
