/** @file Copies boxes between row-major arrays with arbitrary strides: the loop behind every movement op. */
import { type Shape, sizeOf, stridesOf } from '@moe/core'
import type { Elements } from './memory.ts'

/** Strides of `from` broadcast to `to`: 0 along broadcast and missing axes. */
export function broadcastStrides(from: Shape, to: Shape): number[] {
  const own = stridesOf(from)
  const missing = to.length - from.length
  return to.map((_, axis) => (axis < missing || from[axis - missing] === 1 ? 0 : own[axis - missing]))
}

/** The offset of every element of a box, in row-major order, with the given strides. */
export function positions(shape: Shape, strides: readonly number[]): Int32Array {
  const index = new Int32Array(sizeOf(shape))
  let filled = Math.min(1, index.length)
  // Built from the last axis: the block so far is repeated for each step of the next axis.
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const block = filled
    for (let i = 1; i < shape[axis]; i++) {
      const shift = i * strides[axis]
      for (let j = 0; j < block; j++) index[filled++] = index[j] + shift
    }
  }
  return index
}

const tile = 16

/** `to[r * toRow + c] = from[r * fromRow + c * fromColumn]`; transposes are done tile by tile. */
function copyMatrix(
  from: Elements,
  start: number,
  fromRow: number,
  fromColumn: number,
  to: Elements,
  toStart: number,
  toRow: number,
  rows: number,
  columns: number,
): void {
  if (fromColumn === 1) {
    // For short runs, a loop is faster than creating subarrays.
    if (columns >= 48) {
      for (let r = 0; r < rows; r++) {
        const at = start + r * fromRow
        to.set(from.subarray(at, at + columns), toStart + r * toRow)
      }
    } else {
      for (let r = 0; r < rows; r++) {
        const source = start + r * fromRow
        const target = toStart + r * toRow
        for (let c = 0; c < columns; c++) to[target + c] = from[source + c]
      }
    }
    return
  }
  for (let r0 = 0; r0 < rows; r0 += tile) {
    const r1 = Math.min(rows, r0 + tile)
    for (let c0 = 0; c0 < columns; c0 += tile) {
      const c1 = Math.min(columns, c0 + tile)
      for (let r = r0; r < r1; r++) {
        const source = start + r * fromRow
        const target = toStart + r * toRow
        for (let c = c0; c < c1; c++) to[target + c] = from[source + c * fromColumn]
      }
    }
  }
}

/** One side of a copy: the start of the box, and its stride along every axis. */
export interface Side {
  readonly data: Elements
  readonly start: number
  readonly strides: readonly number[]
}

/** Copies a box of `shape` from one side to the other. The last axis of `to` must be contiguous or of size 1. */
export function copyBox(shape: Shape, from: Side, to: Side): void {
  if (sizeOf(shape) === 0) return
  const rank = shape.length
  if (rank === 0) {
    to.data[to.start] = from.data[from.start]
    return
  }
  const columns = shape[rank - 1]
  const rows = rank > 1 ? shape[rank - 2] : 1
  const [fromColumn, toRow] = [from.strides[rank - 1], rank > 1 ? to.strides[rank - 2] : 0]
  const fromRow = rank > 1 ? from.strides[rank - 2] : 0
  const descend = (axis: number, source: number, target: number) => {
    if (axis >= rank - 2) {
      copyMatrix(from.data, source, fromRow, fromColumn, to.data, target, toRow, rows, columns)
      return
    }
    for (let i = 0; i < shape[axis]; i++) {
      descend(axis + 1, source + i * from.strides[axis], target + i * to.strides[axis])
    }
  }
  descend(0, from.start, to.start)
}
