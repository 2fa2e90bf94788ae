/** @file One product per expert on Hopper, and the gradient of the experts' weights. */
import type { Cuda } from '../../native.ts'
import { boxColumns } from '../../tensor-map.ts'
import { chooseTile, countTiles, type Matrix, type Tile } from '../matmul/gemm.ts'
import { hopperTiles, operandMap } from '../matmul-sm90a/product.ts'

interface Sizes {
  readonly rows: number
  readonly n: number
  readonly k: number
  readonly experts: number
}

function kernelsOf(cuda: Cuda, direction: 'fwd' | 'bwd', signature: string) {
  return new Map(
    hopperTiles.map(({ name }) => [
      name,
      cuda.kernel('grouped-matmul-sm90a', `moe_grouped_matmul_${direction}_sm90a_${name}`, signature),
    ]),
  )
}

const launchOf = (cuda: Cuda, tile: Tile, jobs: number) => ({
  grid: Math.min(jobs, cuda.multiprocessors),
  block: tile.threads,
  shared: tile.shared,
})

/** y `[rows, n]` = x `[rows, k]` times the weight of each row's expert, `[experts, n, k]`, both in bf16. */
export function hopperGrouped(cuda: Cuda) {
  const kernels = kernelsOf(cuda, 'fwd', 'p t t p i i i i')
  return (y: number, x: Matrix, weight: Matrix, offsets: number, { rows, n, k, experts }: Sizes): void => {
    // Every expert can begin a tile of rows, and so can the rows behind the last one; none is empty.
    const jobs = (tile: Tile) => Math.min(rows, Math.ceil(rows / tile.m) + experts) * Math.ceil(n / tile.n)
    const tile = chooseTile(cuda, hopperTiles, jobs)
    const left = operandMap(cuda, x, 1, rows, k, tile.m)
    const right = operandMap(cuda, weight, experts, n, k, tile.n)
    kernels.get(tile.name)?.(launchOf(cuda, tile, jobs(tile)), y, left, right, offsets, rows, n, k, experts)
  }
}

/** dweight `[experts, n, k]` = dy^T x over the rows of each expert, dy `[rows, n]` and x `[rows, k]` in f32. */
export function hopperWeightGradient(cuda: Cuda) {
  const kernels = kernelsOf(cuda, 'bwd', 'p t t p i i i')
  const packKernel = cuda.kernel('grouped-matmul-sm90a', 'moe_pack_groups_sm90a', 'p p p i i i')
  return (dweight: number, dy: number, x: number, offsets: number, { rows, n, k, experts }: Sizes): void => {
    // Along k, every expert's rows begin at a multiple of 64 and are followed by zeros up to one.
    const ld = Math.floor(rows / boxColumns) * boxColumns + experts * boxColumns
    const pack = (from: number, outer: number): Matrix => {
      const { pointer } = cuda.scratch(outer * ld * 2)
      const grid = (Math.ceil(outer / boxColumns) * ld) / boxColumns
      packKernel({ grid, block: 256 }, pointer, from, offsets, experts, outer, ld)
      return { pointer, ld }
    }
    const jobs = (tile: Tile) => experts * countTiles(tile, n, k)
    const tile = chooseTile(cuda, hopperTiles, jobs)
    const left = operandMap(cuda, pack(dy, n), 1, n, ld, tile.m)
    const right = operandMap(cuda, pack(x, k), 1, k, ld, tile.n)
    kernels.get(tile.name)?.(launchOf(cuda, tile, jobs(tile)), dweight, left, right, offsets, n, k, experts)
  }
}
