/** @file The dense product on Hopper: tiles, and the launch. */
import type { Cuda } from '../../native.ts'
import { boxColumns, type TensorMap } from '../../tensor-map.ts'
import type { Matrix, Tile } from '../matmul/gemm.ts'

/** TileHopper of gemm-hopper.cuh: 128 rows by two warpgroups, and one more warp. */
const tileHopper = (n: number, stages: number, speed: number): Tile => ({
  name: `128x${n}`,
  m: 128,
  n,
  threads: 288,
  shared: stages * (128 + n) * boxColumns * 2 + 1024,
  speed,
})

export const hopperTiles: readonly Tile[] = [tileHopper(256, 4, 1), tileHopper(128, 6, 0.8)]

/** Matrices `[matrices, outer, k]` as an operand, copied in boxes of `boxRows`. */
export function operandMap(
  cuda: Cuda,
  { pointer, ld }: Matrix,
  matrices: number,
  outer: number,
  k: number,
  boxRows: number,
): TensorMap {
  return cuda.tensorMap({ pointer, columns: k, rows: outer, matrices, ld, boxRows })
}

interface Sizes {
  readonly m: number
  readonly n: number
  readonly k: number
  readonly batch: number
  /** Of k, each with a result of its own in c. */
  readonly parts: number
  readonly add: number
}

/** c = a b^T with a `[batch, m, k]` and b `[batch, n, k]` in bf16. */
export function hopperProduct(cuda: Cuda) {
  const kernels = new Map(
    hopperTiles.map(({ name }) => [name, cuda.kernel('matmul-sm90a', `moe_matmul_sm90a_${name}`, 'p t t i i i i i i')]),
  )
  return (tile: Tile, c: number, a: Matrix, b: Matrix, { m, n, k, batch, parts, add }: Sizes): void => {
    const jobs = parts * batch * Math.ceil(m / tile.m) * Math.ceil(n / tile.n)
    const left = operandMap(cuda, a, batch, m, k, tile.m)
    const right = operandMap(cuda, b, batch, n, k, tile.n)
    const launch = { grid: Math.min(jobs, cuda.multiprocessors), block: tile.threads, shared: tile.shared }
    kernels.get(tile.name)?.(launch, c, left, right, m, n, k, batch, parts, add)
  }
}
