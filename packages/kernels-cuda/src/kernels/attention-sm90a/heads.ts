/** @file Heads that Hopper's attention has kernels for, and tensors as these take them. */
import type { Value } from '@moe/core'
import type { Cuda } from '../../native.ts'
import type { TensorMap } from '../../tensor-map.ts'
import { type Round, wholeMatrix } from '../matmul/gemm.ts'

/** Features of keys and of values, to which others are padded. */
export const heads = [
  { dk: 64, dv: 64 },
  { dk: 128, dv: 128 },
  { dk: 192, dv: 128 },
] as const

/** Signature of what every kernel takes at the end: T, S, H, G, Dk, Dv, causal, scale. */
export const sizes = 'i i i i i i i f'

/** Tensors `[batch, rows, heads, features]` in bf16, with features padded to so many, in boxes of some rows. */
export function boxedHeads(
  cuda: Cuda,
  round: Round,
  tensors: ReadonlyArray<{ readonly of: Value; readonly features: number }>,
): (boxRows: number) => TensorMap[] {
  const matrices = tensors.map(({ of, features }) => {
    const [batch, rows, perRow, columns] = of.shape
    return wholeMatrix(of, batch * rows * perRow, columns, features)
  })
  const rounded = round(matrices)
  return boxRows =>
    tensors.map(({ of, features }, i) => {
      const [batch, rows, perRow] = of.shape
      const columns = perRow * features
      return cuda.tensorMap({ pointer: rounded[i].pointer, ld: columns, matrices: batch, rows, columns, boxRows })
    })
}
