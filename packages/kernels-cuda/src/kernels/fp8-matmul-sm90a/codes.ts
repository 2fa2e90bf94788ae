/** @file Operands of Hopper's fp8 products: codes with k contiguous, and scales. */
import { fp8Tile } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'
import { type Fp8Operand, operandMemory, sizesOf, stripes } from '../fp8-operand/fp8-operand.ts'

/** Number of rows if every expert's rows start at a multiple of a tile and are padded with zeros (packed-rows.cuh). */
export const packedRows = (rows: number, experts: number) => (Math.floor(rows / fp8Tile) + experts) * fp8Tile

/** Codes `[matrices][outer][ld]`, of which the first `k` per row are used, and f32 scales `[matrices][ceil(k / 128)][ldScales]`. */
export interface Fp8Codes {
  readonly pointer: number
  readonly matrices: number
  readonly outer: number
  readonly k: number
  readonly ld: number
  readonly scales: number
  readonly ldScales: number
}

type CodesShape = Pick<Fp8Codes, 'matrices' | 'outer' | 'k'>

/** Memory for codes, allocated by `allocate`. */
function allocateCodes(
  cuda: Cuda,
  shape: CodesShape,
  allocate: (bytes: number) => { pointer: number; isFilled: boolean },
) {
  const { matrices, outer, k } = shape
  const ld = Math.ceil(k / 16) * 16
  const ldScales = Math.ceil(outer / fp8Tile) * fp8Tile
  const codeBytes = Math.ceil((matrices * outer * ld) / 256) * 256
  const scaleBytes = matrices * Math.ceil(k / fp8Tile) * ldScales * 4
  const { pointer, isFilled } = allocate(codeBytes + scaleBytes)
  const scales = pointer + codeBytes
  // They are copied in tiles of rows.
  if (!isFilled && ldScales > outer) cuda.clear(scales, scaleBytes)
  return { codes: { pointer, ...shape, ld, scales, ldScales }, isFilled }
}

/** Scratch memory for the codes of one matrix. */
export function scratchCodes(cuda: Cuda, outer: number, k: number): Fp8Codes {
  const allocate = (bytes: number) => ({ ...cuda.scratch(bytes), isFilled: false })
  return allocateCodes(cuda, { matrices: 1, outer, k }, allocate).codes
}

/** The operand as codes with k contiguous. Equal runs become matrices; runs given by offsets become one matrix, in which each starts at a tile. */
export function fp8AsCodes(cuda: Cuda): (operand: Fp8Operand) => Fp8Codes {
  const along = cuda.kernel('fp8-matmul-sm90a', 'moe_fp8_codes_along_sm90a', 'p p p i i i i i')
  const across = cuda.kernel('fp8-matmul-sm90a', 'moe_fp8_codes_across_sm90a', 'p p p p i i i i i')
  return operand => {
    const { rows, columns, tiles, runs, offsets } = sizesOf(operand)
    const matrices = offsets === 0 ? runs : 1
    const outer = operand.along ? rows / runs : columns
    const k = operand.along ? columns : offsets === 0 ? rows / runs : packedRows(rows, runs)
    const form = `fp8, ${operand.along} ${matrices} ${outer}`
    const shape = { matrices, outer, k }
    const { codes, isFilled } = allocateCodes(cuda, shape, bytes => operandMemory(cuda, operand, form, bytes))
    if (isFilled) return codes
    const { pointer, scales, ld, ldScales } = codes
    const from = pointerOf(operand.value)
    if (operand.along) {
      const launch = { grid: [Math.ceil(rows / 8), tiles], block: 256 }
      along(launch, pointer, scales, from, rows, columns, outer, ld, ldScales)
    } else {
      across(stripes(columns, tiles), pointer, scales, from, offsets, rows, columns, ld, ldScales, runs)
    }
    return codes
  }
}
