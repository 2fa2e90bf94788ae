/** @file Dense products on Hopper: tiles and launches. */

import type { Matrix } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import { boxColumns, type TensorMap } from '../../tensor-map.ts'
import type { Tile } from '../matmul/tiles.ts'

/** TileHopper in gemm-hopper.cuh: 128 rows by two warpgroups, and one more warp. */
const tileHopper = (n: number, stages: number, speed: number): Tile => ({
  name: `128x${n}`,
  m: 128,
  n,
  threads: 288,
  shared: stages * (128 + n) * boxColumns * 2 + 1024,
  speed,
})

export const hopperTiles: readonly Tile[] = [tileHopper(256, 4, 1), tileHopper(128, 6, 0.8)]

/** Widths in between, for dense products that may have few tiles: 576 columns are 4 tiles of 144. */
const medium = tileHopper(192, 5, 0.93)
const narrow = tileHopper(144, 6, 0.84)
export const denseHopperTiles: readonly Tile[] = [...hopperTiles, medium, narrow]

const forms = ['nn', 'nt', 'tn', 'tt'] as const

/** The available tiles for a product of this form. */
export const tilesOfForm = (form: string): readonly Tile[] =>
  form === 'nt' ? denseHopperTiles : denseHopperTiles.filter(tile => tile !== narrow)

/** An operand of a product, read in tiles. */
interface Operand {
  readonly matrices: number
  /** Size of the axis that is not summed over, and its size in a tile. */
  readonly outer: number
  readonly tile: number
  readonly k: number
  /** Whether matrices are `[k, outer]` rather than `[outer, k]`. */
  readonly across: boolean
}

/** How gemm-hopper.cuh copies an operand. */
export function operandMap(cuda: Cuda, matrix: Matrix, { matrices, outer, tile, k, across }: Operand): TensorMap {
  return across
    ? cuda.tensorMap({ ...matrix, matrices, rows: k, columns: outer, boxRows: boxColumns })
    : cuda.tensorMap({ ...matrix, matrices, rows: outer, columns: k, boxRows: tile })
}

interface Sizes {
  readonly m: number
  readonly n: number
  readonly k: number
  readonly batch: number
  /** Number of parts of k; each has its own result in c. */
  readonly parts: number
  readonly add: number
}

/** c = a b in bf16; `form` tells whether a and b are transposed (`n`, `t`). */
export function hopperProduct(cuda: Cuda) {
  const kernels = new Map(
    forms.flatMap(form =>
      tilesOfForm(form).map(({ name }) => {
        const variant = `${name}_${form}`
        return [variant, cuda.kernel('matmul-sm90a', `moe_matmul_sm90a_${variant}`, 'p t t i i i i i i')]
      }),
    ),
  )
  return (tile: Tile, form: string, c: number, a: Matrix, b: Matrix, sizes: Sizes): void => {
    const { m, n, k, batch, parts, add } = sizes
    const jobs = parts * batch * Math.ceil(m / tile.m) * Math.ceil(n / tile.n)
    const left = operandMap(cuda, a, { matrices: batch, outer: m, tile: tile.m, k, across: form[0] === 't' })
    const right = operandMap(cuda, b, { matrices: batch, outer: n, tile: tile.n, k, across: form[1] === 'n' })
    const launch = { grid: Math.min(jobs, cuda.multiprocessors), block: tile.threads, shared: tile.shared }
    kernels.get(`${tile.name}_${form}`)?.(launch, c, left, right, m, n, k, batch, parts, add)
  }
}
