/** @file One product per expert on Hopper, and the gradient of the experts' weights. */

import type { Matrix } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import { boxColumns } from '../../tensor-map.ts'
import { paddedColumns } from '../matmul/operands.ts'
import { chooseTile, countTiles, type Tile } from '../matmul/tiles.ts'
import { hopperTiles, operandMap } from '../matmul-sm90a/product.ts'

export interface Sizes {
  readonly rows: number
  readonly n: number
  readonly k: number
  readonly experts: number
}

const kernelOf = (cuda: Cuda, variant: string, signature: string) =>
  cuda.kernel('grouped-matmul-sm90a', `moe_grouped_matmul_${variant}`, signature)

const launchOf = (cuda: Cuda, tile: Tile, jobs: number) => ({
  grid: Math.min(jobs, cuda.multiprocessors),
  block: tile.threads,
  shared: tile.shared,
})

/** y `[rows, n]` = x `[rows, k]` times the weight of each row's expert, `[experts, k, n]` or transposed `[experts, n, k]`, both in bf16. */
export function hopperGrouped(cuda: Cuda) {
  const kernels = new Map(
    hopperTiles.flatMap(({ name }) =>
      ['n', 't'].map(form => {
        const variant = `${name}_${form}`
        return [variant, kernelOf(cuda, `fwd_sm90a_${variant}`, 'p t t p i i i i')]
      }),
    ),
  )
  return (y: number, x: Matrix, weight: Matrix, offsets: number, sizes: Sizes & { transposeW: boolean }): void => {
    const { rows, n, k, experts, transposeW } = sizes
    // Every expert may start a row tile, and so may the rows after the last one. None of the sizes is zero.
    const jobs = (tile: Tile) => Math.min(rows, Math.ceil(rows / tile.m) + experts) * Math.ceil(n / tile.n)
    const tile = chooseTile(cuda, hopperTiles, jobs)
    const left = operandMap(cuda, x, { matrices: 1, outer: rows, tile: tile.m, k, across: false })
    const right = operandMap(cuda, weight, { matrices: experts, outer: n, tile: tile.n, k, across: !transposeW })
    const kernel = kernels.get(`${tile.name}_${transposeW ? 't' : 'n'}`)
    kernel?.(launchOf(cuda, tile, jobs(tile)), y, left, right, offsets, rows, n, k, experts)
  }
}

/** Number of rows if every expert's rows start at a multiple of 64 and are padded with zeros (packed-rows.cuh). */
export const packedRows = (rows: number, experts: number) =>
  Math.floor(rows / boxColumns) * boxColumns + experts * boxColumns

/** dweight `[experts, n, k]` = dy^T x over the rows of each expert, dy `[rows, n]` and x `[rows, k]` in bf16 and packed. */
export function hopperPackedWeightGradient(cuda: Cuda) {
  const kernels = new Map(hopperTiles.map(({ name }) => [name, kernelOf(cuda, `bwd_sm90a_${name}`, 'p t t p i i i')]))
  return (dweight: number, dy: Matrix, x: Matrix, offsets: number, { rows, n, k, experts }: Sizes): void => {
    const jobs = (tile: Tile) => experts * countTiles(tile, n, k)
    const tile = chooseTile(cuda, hopperTiles, jobs)
    const operand = { matrices: 1, k: packedRows(rows, experts), across: true }
    const left = operandMap(cuda, dy, { ...operand, outer: n, tile: tile.m })
    const right = operandMap(cuda, x, { ...operand, outer: k, tile: tile.n })
    kernels.get(tile.name)?.(launchOf(cuda, tile, jobs(tile)), dweight, left, right, offsets, n, k, experts)
  }
}

/** The same for dy and x in f32 and not packed. */
export function hopperWeightGradient(cuda: Cuda) {
  const multiply = hopperPackedWeightGradient(cuda)
  const packKernel = cuda.kernel('grouped-matmul-sm90a', 'moe_pack_groups_sm90a', 'p p p i i i')
  return (dweight: number, dy: number, x: number, offsets: number, sizes: Sizes): void => {
    const { rows, n, k, experts } = sizes
    const packed = packedRows(rows, experts)
    const pack = (from: number, columns: number): Matrix => {
      const ld = paddedColumns(columns)
      const { pointer } = cuda.scratch(packed * ld * 2)
      packKernel({ grid: packed / boxColumns, block: 256 }, pointer, from, offsets, experts, columns, ld)
      return { pointer, ld }
    }
    multiply(dweight, pack(dy, n), pack(x, k), offsets, sizes)
  }
}
