/** @file Operands of products in precision 'fp8', as bf16, which represents the rounded values exactly. */
import { fp8Tile, sizeOf, type Value } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import type { LaunchShape } from '../../modules.ts'
import { type Cuda, pointerOf } from '../../native.ts'
import { paddedColumns } from '../matmul/operands.ts'

/** A tensor of rows. k runs along a row or across rows: across `runs` equal runs of rows (default 1), or across those given by `offsets` (`i32 [runs + 1]`). */
export interface Fp8Operand {
  readonly value: Value
  readonly along: boolean
  readonly runs?: number
  readonly offsets?: Value
}

/** Columns per block of the kernels that round across rows. */
const stripe = 32

/** Blocks of the kernels that round across rows; each 128 rows of a run, or of an expert, are a tile. */
export const stripes = (columns: number, tiles: number): LaunchShape => ({
  grid: Math.ceil(columns / stripe) * tiles,
  block: 256,
})

/** As in expertTile: every expert may start a tile, and so may the rows after the last one. */
export const tilesOfExperts = (rows: number, experts: number) => Math.min(rows, Math.ceil(rows / fp8Tile) + experts)

/** Rows and columns, and the number of tiles of 128 that get a block. */
export function sizesOf({ value, along, runs = 1, offsets }: Fp8Operand) {
  const rows = sizeOf(value.shape.slice(0, -1))
  const columns = value.shape[value.shape.length - 1]
  const tiles = along
    ? Math.ceil(columns / fp8Tile)
    : offsets === undefined
      ? runs * Math.ceil(rows / runs / fp8Tile)
      : tilesOfExperts(rows, runs)
  return { rows, columns, tiles, runs, offsets: offsets === undefined ? 0 : pointerOf(offsets) }
}

/** Memory for a rounded operand: cached until the tensor changes, or only for this op if the result depends on offsets. */
export function operandMemory(cuda: Cuda, { value, offsets }: Fp8Operand, form: string, bytes: number) {
  if (offsets === undefined && bytes > 0) return cuda.rounded(value, form, bytes)
  return { pointer: cuda.scratch(bytes).pointer, isFilled: false }
}

/** The operand in bf16, in the same layout. */
export function fp8AsBf16(cuda: Cuda): (operand: Fp8Operand) => Matrix {
  const along = cuda.kernel('fp8-operand', 'moe_fp8_operand_along_bf16', 'p p i i i')
  const across = cuda.kernel('fp8-operand', 'moe_fp8_operand_across_bf16', 'p p p i i i i')
  return operand => {
    const { rows, columns, tiles, runs, offsets } = sizesOf(operand)
    const ld = paddedColumns(columns)
    const form = `fp8 in bf16, ${operand.along} ${runs} ${columns}`
    const { pointer, isFilled } = operandMemory(cuda, operand, form, rows * ld * 2)
    if (isFilled) return { pointer, ld }
    const from = pointerOf(operand.value)
    if (operand.along) along({ grid: [Math.ceil(rows / 8), tiles], block: 256 }, pointer, from, rows, columns, ld)
    else across(stripes(ld, tiles), pointer, from, offsets, rows, columns, ld, runs)
    return { pointer, ld }
  }
}
