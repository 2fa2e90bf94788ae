/** @file Head sizes of the Hopper attention kernels, and their operands. */
import type { Value } from '@moe/core'
import type { Cuda } from '../../native.ts'
import type { TensorMap } from '../../tensor-map.ts'
import { type Round, wholeMatrix } from '../matmul/operands.ts'

const [together, apart] = [['keys'], ['keys', 'values']]

/**
 * Per kernel: features of keys and of values, to which smaller heads are padded; keys per step of the forward pass and columns per step of the backward pass (FlashHopper and
 * BackwardHopper in attention-sm90a.cu); and the kernels for the gradients of keys and values: one for both, or one each.
 */
export const heads = [
  { dk: 64, dv: 64, forward: 128, backward: 64, keyKernels: together },
  { dk: 128, dv: 128, forward: 128, backward: 64, keyKernels: together },
  { dk: 192, dv: 128, forward: 128, backward: 64, keyKernels: together },
  { dk: 256, dv: 256, forward: 80, backward: 32, keyKernels: apart },
] as const

/** Signature of the last arguments of every kernel: T, S, H, G, Dk, Dv, causal, scale. */
export const sizes = 'i i i i i i i f'

/** Tensors `[batch, rows, heads, features]` in bf16 with padded features, read in boxes of several rows. */
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
