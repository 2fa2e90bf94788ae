/** @file The index scores of sparse attention, without storing the products of the single heads. */
import type { WidePrecision } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'
import { operands, roundToBf16, wholeMatrix } from '../matmul/operands.ts'
import { chooseTile, type Tile, tiles } from '../matmul/tiles.ts'

/** The tiles of each precision: their rows are keys, their columns the heads of one query (f32) or of two (bf16). */
const variants: { readonly [P in WidePrecision]: { readonly among: readonly Tile[]; readonly queries: number } } = {
  f32: { among: tiles.f32.filter(({ m }) => m === 64), queries: 1 },
  bf16: { among: tiles.bf16.filter(({ n }) => n <= 128), queries: 2 },
}

export const indexScores: FusedFactory<'indexScores'> = cuda => {
  const round = roundToBf16(cuda)
  const kernels = new Map(
    Object.values(variants).flatMap(({ among }) =>
      among.map(({ name }) => [
        name,
        cuda.kernel('index-scores', `moe_index_scores_fwd_${name}`, 'p p p p p i i i i i i'),
      ]),
    ),
  )
  return ([q, weights, keys, limits], { precision }, [spec]) => {
    const scores = cuda.output(spec)
    const [B, T, J, D] = q.shape
    const S = keys.shape[1]
    if (B * T * S === 0) return [scores]
    const { among, queries } = variants[precision]
    const blocks = (tile: Tile) => B * Math.ceil(S / tile.m) * Math.ceil(T / queries)
    // A tile with fewer columns than heads takes several turns.
    const turns = (tile: Tile) => Math.ceil((J * queries) / tile.n)
    const tile = chooseTile(cuda, among, each => blocks(each) * turns(each))
    const [left, right] = operands(round, precision, [wholeMatrix(q, B * T * J, D), wholeMatrix(keys, B * S, D)])
    kernels.get(tile.name)?.(
      { grid: blocks(tile), block: tile.threads, shared: tile.shared },
      scores.pointer,
      left.pointer,
      right.pointer,
      pointerOf(weights),
      limits ? pointerOf(limits) : 0,
      ...[T, J, D, S, left.ld, right.ld],
    )
    return [scores]
  }
}
