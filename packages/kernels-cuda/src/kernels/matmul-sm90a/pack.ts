/** @file Operands on Hopper, where k runs along memory: f32 matrices are rounded to bf16, and what lies the other way is transposed. */
import type { Cuda } from '../../native.ts'
import { boxColumns } from '../../tensor-map.ts'
import type { Matrix, Round } from '../matmul/gemm.ts'

/** Sizes of operands `[matrices, outer, k]`. */
interface Sizes {
  readonly matrices: number
  readonly outer: number
  readonly k: number
  /** Address of how many k of each matrix count; the others become zeros. Of transposed ones only. */
  readonly lengths?: number
}

/** Operands of matrices `[matrices, k, outer]` in rows of `ld`. */
export function transposeForHopper(cuda: Cuda, dtype: 'f32' | 'bf16') {
  const kernel = cuda.kernel('matmul-sm90a', `moe_pack_sm90a_${dtype}`, 'p p p i i i i')
  return (from: Matrix, { matrices, outer, k, lengths = 0 }: Sizes): Matrix => {
    const ld = Math.ceil(k / 8) * 8
    const { pointer } = cuda.scratch(matrices * outer * ld * 2)
    const blocks = matrices * Math.ceil(outer / boxColumns) * Math.ceil(k / boxColumns)
    kernel({ grid: blocks, block: 256 }, pointer, from.pointer, lengths, outer, from.ld, k, ld)
    return { pointer, ld }
  }
}

/** f32 matrices without gaps, `[matrices, outer, k]` or, when transposed, `[matrices, k, outer]`. */
export interface Unpacked extends Sizes {
  readonly pointer: number
  readonly transposed: boolean
}

/** Operands of f32 matrices. */
export function packForHopper(cuda: Cuda, round: Round) {
  const transpose = transposeForHopper(cuda, 'f32')
  return ({ pointer, transposed, ...sizes }: Unpacked): Matrix => {
    const { matrices, outer, k } = sizes
    if (transposed) return transpose({ pointer, ld: outer }, sizes)
    return round([{ pointer, rows: matrices * outer, columns: k }])[0]
  }
}
