/** @file The index scores of sparse attention, forward and backward, without storing the products of the single heads. */
import { sizeOf, type WidePrecision } from '@moe/core'
import type { CudaBuffer } from '../../memory.ts'
import { elementwiseGrid, type FusedFactory, pointerOf } from '../../native.ts'
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

/** Features of the kernels for gradients. In bf16, queries and keys are padded to as many. */
const mostFeatures = 128
/** Minimum number of queries whose gradients of keys one block sums. */
const leastQueries = 8

/** Tiles of the gradients: m heads and n keys for those of queries, m keys and n heads for those of keys. Heads are in groups. */
const backwardTiles = {
  f32: { threads: 256, m: 32, n: 32, rowBytes: (mostFeatures + 4) * 4, stages: 1, scratch: 32 * 33 * 4 },
  bf16: { threads: 128, m: 128, n: 32, rowBytes: mostFeatures * 2, stages: 2, scratch: 0 },
} as const
const headGroup = 32

export const indexScoresBackward: FusedFactory<'indexScoresBackward'> = cuda => {
  const round = roundToBf16(cuda)
  const kernel = (name: string, signature: string) =>
    cuda.kernel('index-scores', `moe_index_scores_bwd_${name}`, signature)
  const kernelsOf = (precision: WidePrecision) => ({
    ofQueries: kernel(`queries_${precision}`, 'p p p p p p p i i i i'),
    ofKeys: kernel(`keys_${precision}`, 'p p p p p p i i i i'),
  })
  const kernels = { f32: kernelsOf('f32'), bf16: kernelsOf('bf16') }
  const sum = cuda.kernel('matmul', 'moe_matmul_sum_f32', 'p p l i i')
  return ([q, weights, keys, dscores, limits], { precision }, specs) => {
    const [B, T, J, D] = q.shape
    const S = keys.shape[1]
    const { threads, m, n, rowBytes, stages, scratch } = backwardTiles[precision]
    if (D > mostFeatures) return undefined
    const outputs = specs.map(cuda.output)
    const [dq, dweights, dkeys] = outputs
    const add = (to: CudaBuffer, parts: CudaBuffer, count: number, n: number) =>
      sum({ grid: elementwiseGrid(cuda, n), block: 256 }, to.pointer, parts.pointer, n, count, 0)
    if (B * T * J * D * S === 0) {
      for (const [i, { shape }] of specs.entries()) add(outputs[i], outputs[i], 0, sizeOf(shape))
      return outputs
    }
    const ld = precision === 'bf16' ? mostFeatures : D
    const [left, right] = operands(round, precision, [
      wholeMatrix(q, B * T * J, D, ld),
      wholeMatrix(keys, B * S, D, ld),
    ])
    const addresses = [left.pointer, right.pointer, pointerOf(weights), pointerOf(dscores)]
    const inputs = [...addresses, limits ? pointerOf(limits) : 0, T, J, D, S]
    const { ofQueries, ofKeys } = kernels[precision]
    const shared = scratch + m * rowBytes + stages * n * rowBytes
    const groups = T * Math.ceil(J / headGroup)
    const launch = { grid: B * Math.ceil(groups / (m / headGroup)), block: threads, shared }
    ofQueries(launch, dq.pointer, dweights.pointer, ...inputs)
    // If keys are few, several blocks have the same keys and different queries, so that all multiprocessors work.
    const blocks = B * Math.ceil(S / m)
    const wanted = Math.ceil((2 * cuda.multiprocessors) / blocks)
    const parts = Math.max(1, Math.min(wanted, Math.floor(T / leastQueries)))
    const count = sizeOf(keys.shape)
    const sums = parts > 1 ? cuda.scratch(parts * count * 4) : dkeys
    ofKeys({ grid: [blocks, parts], block: threads, shared: shared + stages * n * 4 }, sums.pointer, ...inputs)
    if (parts > 1) add(dkeys, sums, parts, count)
    return outputs
  }
}
