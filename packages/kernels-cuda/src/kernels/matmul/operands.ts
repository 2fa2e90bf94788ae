/** @file Operands of matrix products: f32 matrices, rounded to bf16 where the product wants it. */
import type { Value, WidePrecision } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import { contiguousForm } from '../../memory.ts'
import { type Cuda, pointerOf } from '../../native.ts'

/** A contiguous f32 matrix. */
export interface DenseMatrix {
  readonly pointer: number
  readonly rows: number
  readonly columns: number
  /** Row pitch of the matrix in bf16; default: columns rounded up to a multiple of 8. */
  readonly ld?: number
  /** Address for the matrix in bf16; default: scratch memory. */
  readonly to?: number
  /** The tensor, if the matrix is all of it: then it is rounded once for all products that read it. */
  readonly of?: Value
}

/** A tensor as a matrix with `rows` rows. */
export const wholeMatrix = (of: Value, rows: number, columns: number, ld?: number): DenseMatrix => ({
  pointer: pointerOf(of),
  rows,
  columns,
  ld,
  of,
})

/** Whole 16-byte chunks, as the kernels copy them. */
export const paddedColumns = (columns: number) => Math.ceil(columns / 8) * 8

/** Maximum number of matrices that one launch rounds. */
const mostRounded = 4

export type Round = (matrices: readonly DenseMatrix[]) => Matrix[]

/** Up to four matrices, rounded to bf16 by one launch if they are not yet. */
export function roundToBf16(cuda: Cuda): Round {
  const kernel = cuda.kernel(
    'matmul',
    'moe_round_bf16',
    `p[${mostRounded}] p[${mostRounded}] l[${mostRounded}] i[${mostRounded}] i[${mostRounded}]`,
  )
  return matrices => {
    const rounded = matrices.map(matrix => {
      const { pointer: from, rows, columns, ld = paddedColumns(columns), to, of } = matrix
      const form = ld === columns ? contiguousForm : `bf16 ${columns} ${ld}`
      const known = of && rows * ld > 0 ? cuda.rounded(of, form, rows * ld * 2) : undefined
      const pointer = known?.pointer ?? to ?? cuda.scratch(rows * ld * 2).pointer
      return { from, rows, columns, ld, pointer, isFilled: known?.isFilled ?? false }
    })
    const unfilled = rounded.filter(({ isFilled }) => !isFilled)
    if (unfilled.length > 0) {
      const most = Math.max(...unfilled.map(({ rows, ld }) => (rows * ld) / 8))
      kernel(
        { grid: [Math.min(Math.ceil(most / 256), cuda.multiprocessors * 16), unfilled.length], block: 256 },
        unfilled.map(x => x.pointer),
        unfilled.map(x => x.from),
        unfilled.map(x => x.rows),
        unfilled.map(x => x.columns),
        unfilled.map(x => x.ld),
      )
    }
    return rounded
  }
}

/** The matrices as operands of a product in this precision. */
export function operands(round: Round, precision: WidePrecision, matrices: readonly DenseMatrix[]): Matrix[] {
  return precision === 'bf16' ? round(matrices) : matrices.map(({ pointer, columns }) => ({ pointer, ld: columns }))
}
