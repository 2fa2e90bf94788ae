/** @file Operands as Hopper's products in fp8 take them: codes with k along memory, and scales. */
import { fp8Tile } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'
import { type Fp8Operand, placeFor, sizesOf, stripe } from '../fp8-operand/fp8-operand.ts'

/** Where every expert's rows begin at a multiple of a tile and are followed by zeros up to one (packed-rows.cuh). */
const packedRows = (rows: number, experts: number) => (Math.floor(rows / fp8Tile) + experts) * fp8Tile

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
