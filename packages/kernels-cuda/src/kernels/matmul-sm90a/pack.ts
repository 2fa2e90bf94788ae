/** @file f32 matrices as operands on Hopper, where k runs along memory: rounded to bf16, and transposed where it does not. */
import type { Cuda } from '../../native.ts'
import { boxColumns } from '../../tensor-map.ts'
import { type Matrix, paddedColumns, type Round } from '../matmul/gemm.ts'

/** f32 matrices `[matrices, outer, k]`, or `[matrices, k, outer]` when transposed. */
export interface Unpacked {
  readonly pointer: number
  readonly matrices: number
  readonly outer: number
  readonly k: number
  readonly transposed: boolean
  /** Of a transposed one: address of how many k of each matrix count; the others become zeros. */
  readonly lengths?: number
}

export type Pack = (matrices: Unpacked) => Matrix

export function packForHopper(cuda: Cuda, round: Round): Pack {
  const transpose = cuda.kernel('matmul-sm90a', 'moe_pack_transposed_sm90a', 'p p p i i i')
  return ({ pointer, matrices, outer, k, transposed, lengths = 0 }) => {
    if (!transposed) return round([{ pointer, rows: matrices * outer, columns: k }])[0]
    const ld = paddedColumns(k)
    const to = cuda.scratch(matrices * outer * ld * 2).pointer
    const blocks = matrices * Math.ceil(outer / boxColumns) * Math.ceil(k / boxColumns)
    transpose({ grid: blocks, block: 256 }, to, pointer, lengths, outer, k, ld)
    return { pointer: to, ld }
  }
}
