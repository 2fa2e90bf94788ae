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

/** Widths between, for dense products, of which one may have few tiles: those of 576 columns are 4 of 144. */
const medium = tileHopper(192, 5, 0.93)
const narrow = tileHopper(144, 6, 0.84)
export const denseHopperTiles: readonly Tile[] = [...hopperTiles, medium, narrow]

const forms = ['nn', 'nt', 'tn', 'tt'] as const

/** Tiles that there are for a product of that form. */
export const tilesOfForm = (form: string): readonly Tile[] =>
  form === 'nt' ? denseHopperTiles : denseHopperTiles.filter(tile => tile !== narrow)

/** An operand of a product in tiles. */
interface Operand {
  readonly matrices: number
  /** What is not summed over, and how much of it a tile has. */
  readonly outer: number
  readonly tile: number
  readonly k: number
  /** Whether matrices are `[k, outer]`, and not `[outer, k]`. */
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
  /** Of k, each with a result of its own in c. */
  readonly parts: number
  readonly add: number
}

/** c = a b in bf16; `form` says whether a and b are transposed (`n`, `t`). */
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
