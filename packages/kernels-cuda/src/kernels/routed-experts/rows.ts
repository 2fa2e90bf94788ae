/** @file Shared by the routed experts of all precisions: sizes, and rows in bf16. */
import type { Value } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import { paddedColumns } from '../matmul/operands.ts'

/** N tokens, K choices per token, M rows, E experts, D features, I inner features. */
export function sizesOf([x, gate, , , weights]: readonly Value[]) {
  const [N, D] = x.shape
  const [E, I] = gate.shape
  const K = weights.shape[1]
  return { N, D, E, I, K, M: N * K }
}
export type ExpertSizes = ReturnType<typeof sizesOf>

export const rowKernel = (cuda: Cuda, name: string, signature: string) =>
  cuda.kernel('routed-experts', `moe_routed_experts_${name}_bf16`, signature)
export const gatherOf = (cuda: Cuda) => rowKernel(cuda, 'gather', 'p p p l i l i')
export const combineOf = (cuda: Cuda) => rowKernel(cuda, 'combine', 'p p p p l i l i i')

/** Scratch memory for rows. */
export function scratchRows(cuda: Cuda, rows: number, columns: number): Matrix {
  const ld = paddedColumns(columns)
  return { pointer: cuda.scratch(rows * ld * 2).pointer, ld }
}
