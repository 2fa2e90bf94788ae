/** @file Operands of products in precision 'fp8': as bf16 numbers, which are the same, or as codes and scales for Hopper's products. */
import { fp8Tile, sizeOf, type Value } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'
import { type Matrix, paddedColumns } from '../matmul/gemm.ts'

/** Where every expert's rows begin at a multiple of a tile and are followed by zeros up to one (packed-rows.cuh). */
const packedRows = (rows: number, experts: number) => (Math.floor(rows / fp8Tile) + experts) * fp8Tile

/** A tensor of rows. k lies along them, or across: in `runs` runs of as many rows (default 1), or in those that `offsets` say (`i32 [runs + 1]`). */
export interface Fp8Operand {
  readonly value: Value
  readonly along: boolean
  readonly runs?: number
  readonly offsets?: Value
}

/** Columns of a block that rounds across rows. */
const stripe = 64

function sizesOf({ value, along, runs = 1, offsets }: Fp8Operand) {
  const rows = sizeOf(value.shape.slice(0, -1))
  const columns = value.shape[value.shape.length - 1]
  // As in expertTile: every expert can begin a tile, and so can the rows behind the last one.
  const ofExperts = Math.min(rows, Math.ceil(rows / fp8Tile) + runs)
  const tiles = along
    ? Math.ceil(columns / fp8Tile)
    : offsets === undefined
      ? runs * Math.ceil(rows / runs / fp8Tile)
      : ofExperts
  return { rows, columns, tiles, runs, offsets: offsets === undefined ? 0 : pointerOf(offsets) }
}

/** Memory for a rounded operand: for as long as the tensor stays what it is, or for this op where offsets have a say in it. */
function placeFor(cuda: Cuda, { value, offsets }: Fp8Operand, form: string, bytes: number) {
  if (offsets === undefined && bytes > 0) return cuda.rounded(value, form, bytes)
  return { pointer: cuda.scratch(bytes).pointer, isFilled: false }
}

/** The operand in bf16, lying as before. */
export function fp8AsBf16(cuda: Cuda): (operand: Fp8Operand) => Matrix {
  const along = cuda.kernel('fp8-operand', 'moe_fp8_operand_along_bf16', 'p p i i i')
  const across = cuda.kernel('fp8-operand', 'moe_fp8_operand_across_bf16', 'p p p i i i i')
  return operand => {
    const { rows, columns, tiles, runs, offsets } = sizesOf(operand)
    const ld = paddedColumns(columns)
    const form = `fp8 in bf16, ${operand.along} ${runs} ${columns}`
    const { pointer, isFilled } = placeFor(cuda, operand, form, rows * ld * 2)
    if (isFilled) return { pointer, ld }
    const from = pointerOf(operand.value)
    if (operand.along) along({ grid: [Math.ceil(rows / 8), tiles], block: 256 }, pointer, from, rows, columns, ld)
    else across({ grid: [Math.ceil(ld / stripe), tiles], block: 256 }, pointer, from, offsets, rows, columns, ld, runs)
    return { pointer, ld }
  }
}

/** Codes `[matrices][outer][ld]`, of which `k` in a row count, and f32 scales `[matrices][ceil(k / 128)][ldScales]`. */
export interface Fp8Codes {
  readonly pointer: number
  readonly matrices: number
  readonly outer: number
  readonly k: number
  readonly ld: number
  readonly scales: number
  readonly ldScales: number
}

/** The operand as codes with k along memory. Runs are matrices; those of offsets are one, in which each begins at a tile. */
export function fp8AsCodes(cuda: Cuda): (operand: Fp8Operand) => Fp8Codes {
  const along = cuda.kernel('fp8-matmul-sm90a', 'moe_fp8_codes_along_sm90a', 'p p p i i i i i')
  const across = cuda.kernel('fp8-matmul-sm90a', 'moe_fp8_codes_across_sm90a', 'p p p p i i i i i')
  return operand => {
    const { rows, columns, tiles, runs, offsets } = sizesOf(operand)
    const matrices = offsets === 0 ? runs : 1
    const outer = operand.along ? rows / runs : columns
    const k = operand.along ? columns : offsets === 0 ? rows / runs : packedRows(rows, runs)
    const ld = Math.ceil(k / 16) * 16
    const ldScales = Math.ceil(outer / fp8Tile) * fp8Tile
    const codeBytes = Math.ceil((matrices * outer * ld) / 256) * 256
    const scaleBytes = matrices * Math.ceil(k / fp8Tile) * ldScales * 4
    const form = `fp8, ${operand.along} ${matrices} ${outer}`
    const { pointer, isFilled } = placeFor(cuda, operand, form, codeBytes + scaleBytes)
    const scales = pointer + codeBytes
    const codes = { pointer, matrices, outer, k, ld, scales, ldScales }
    if (isFilled) return codes
    // They are copied by tiles of rows.
    if (ldScales > outer) cuda.clear(scales, scaleBytes)
    const from = pointerOf(operand.value)
    if (operand.along) {
      along({ grid: [Math.ceil(rows / 8), tiles], block: 256 }, pointer, scales, from, rows, k, outer, ld, ldScales)
    } else {
      const launch = { grid: [Math.ceil(columns / stripe), tiles], block: 256 }
      across(launch, pointer, scales, from, offsets, rows, columns, ld, ldScales, runs)
    }
    return codes
  }
}
