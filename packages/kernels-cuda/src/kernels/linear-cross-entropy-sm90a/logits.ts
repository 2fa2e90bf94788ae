/** @file Tiles of logits on Hopper, reduced to what cross-entropy needs. */

import type { Matrix } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import type { Tile } from '../matmul/tiles.ts'
import { hopperTiles, operandMap } from '../matmul-sm90a/product.ts'

/**
 * Computes the logits x weight^T of a chunk of the vocabulary in tiles, and `outputs` from them: the kernel's arguments before its operands, between the
 * operands and the sizes, and after the sizes.
 */
export type Logits = (
  tile: Tile,
  outputs: readonly number[],
  x: Matrix,
  weight: Matrix,
  inputs: readonly number[],
  sizes: { readonly rows: number; readonly classes: number; readonly features: number },
  rest: readonly number[],
) => void

/** The forward or backward kernel, for bf16 operands with at least one feature. */
export function logitsOnHopper(cuda: Cuda, direction: 'fwd' | 'bwd'): Logits {
  const signature = direction === 'fwd' ? 'p p p t t p i i i i i i' : 'p t t p p p i i i i i i i'
  const kernels = new Map(
    hopperTiles.map(({ name }) => [
      name,
      cuda.kernel('linear-cross-entropy-sm90a', `moe_linear_cross_entropy_${direction}_sm90a_${name}`, signature),
    ]),
  )
  return (tile, outputs, x, weight, inputs, { rows, classes, features }, rest) => {
    const jobs = Math.ceil(rows / tile.m) * Math.ceil(classes / tile.n)
    const operand = { matrices: 1, k: features, across: false }
    kernels.get(tile.name)?.(
      { grid: Math.min(jobs, cuda.multiprocessors), block: tile.threads, shared: tile.shared },
      ...outputs,
      operandMap(cuda, x, { ...operand, outer: rows, tile: tile.m }),
      operandMap(cuda, weight, { ...operand, outer: classes, tile: tile.n }),
      ...inputs,
      rows,
      classes,
      features,
      ...rest,
    )
  }
}
