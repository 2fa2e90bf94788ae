/** @file Shared by the launchers of matrix products: operands, tile sizes, and the dense product. */
import type { Value, WidePrecision } from '@moe/core'
import { contiguousForm } from '../../memory.ts'
import { type Cuda, pointerOf } from '../../native.ts'
import { hopperProduct, tilesOfForm } from '../matmul-sm90a/product.ts'

/** A matrix in device memory with `ld` elements per row: f32, or bf16 with `ld` a multiple of 8 and zeros after each row. */
export interface Matrix {
  readonly pointer: number
  readonly ld: number
}

/** A contiguous f32 matrix. */
export interface DenseMatrix {
  readonly pointer: number
  readonly rows: number
  readonly columns: number
  /** Row pitch of the matrix in bf16; default: columns rounded up to a multiple of 8. */
  readonly ld?: number
  /** Address for the matrix in bf16; default: scratch memory. */
  readonly to?: number
  /** The tensor, if the matrix is all of it: then it is rounded once for all products that read it. */
  readonly of?: Value
}

/** A tensor as a matrix with `rows` rows. */
export const wholeMatrix = (of: Value, rows: number, columns: number, ld?: number): DenseMatrix => ({
  pointer: pointerOf(of),
  rows,
  columns,
  ld,
  of,
})

/** Whole 16-byte chunks, as the kernels copy them. */
export const paddedColumns = (columns: number) => Math.ceil(columns / 8) * 8

/** Maximum number of matrices that one launch rounds. */
const mostRounded = 4

export type Round = (matrices: readonly DenseMatrix[]) => Matrix[]

/** Up to four matrices, rounded to bf16 by one launch if they are not yet. */
export function roundToBf16(cuda: Cuda): Round {
  const kernel = cuda.kernel(
    'matmul',
    'moe_round_bf16',
    `p[${mostRounded}] p[${mostRounded}] l[${mostRounded}] i[${mostRounded}] i[${mostRounded}]`,
  )
  return matrices => {
    const rounded = matrices.map(matrix => {
      const { pointer: from, rows, columns, ld = paddedColumns(columns), to, of } = matrix
      const form = ld === columns ? contiguousForm : `bf16 ${columns} ${ld}`
      const known = of && rows * ld > 0 ? cuda.rounded(of, form, rows * ld * 2) : undefined
      const pointer = known?.pointer ?? to ?? cuda.scratch(rows * ld * 2).pointer
      return { from, rows, columns, ld, pointer, isFilled: known?.isFilled ?? false }
    })
    const unfilled = rounded.filter(({ isFilled }) => !isFilled)
    if (unfilled.length > 0) {
      const most = Math.max(...unfilled.map(({ rows, ld }) => (rows * ld) / 8))
      kernel(
        { grid: [Math.min(Math.ceil(most / 256), cuda.multiprocessors * 16), unfilled.length], block: 256 },
        unfilled.map(x => x.pointer),
        unfilled.map(x => x.from),
        unfilled.map(x => x.rows),
        unfilled.map(x => x.columns),
        unfilled.map(x => x.ld),
      )
    }
    return rounded
  }
}

/** The matrices as operands of a product in this precision. */
export function operands(round: Round, precision: WidePrecision, matrices: readonly DenseMatrix[]): Matrix[] {
  return precision === 'bf16' ? round(matrices) : matrices.map(({ pointer, columns }) => ({ pointer, ld: columns }))
}

/** A kernel variant of gemm.cuh: its tile of c, block size and dynamic shared memory, and its speed relative to the largest. */
export interface Tile {
  readonly name: string
  readonly m: number
  readonly n: number
  readonly threads: number
  readonly shared: number
  readonly speed: number
}

const tileF32 = (size: number, speed: number): Tile => ({
  name: `f32_${size}x${size}`,
  m: size,
  n: size,
  threads: 256,
  shared: 3 * 16 * (2 * size + 8) * 4,
  speed,
})
const tileBf16 = (m: number, n: number, threads: number, speed: number): Tile => ({
  name: `bf16_${m}x${n}`,
  m,
  n,
  threads,
  shared: 4 * (m + n) * 32 * 2,
  speed,
})

export const tiles: { readonly [P in WidePrecision]: readonly Tile[] } = {
  f32: [tileF32(128, 1), tileF32(64, 0.7)],
  bf16: [tileBf16(128, 256, 256, 1), tileBf16(128, 128, 128, 0.9), tileBf16(64, 64, 128, 0.5)],
}

/** Estimated time of this many blocks, per step of k. Multiprocessors process blocks in waves. */
export const timeOf = (cuda: Pick<Cuda, 'multiprocessors'>, tile: Tile, blocks: number) =>
  (Math.ceil(blocks / cuda.multiprocessors) * tile.m * tile.n) / tile.speed

/** For benchmarks: overrides the choice of tile and parts, and records the latest choice. */
export const choice: { tile?: string; parts?: number; readonly taken: { tile?: string; parts?: number } } = {
  taken: {},
}

/** The variant with the least estimated time, given its number of blocks. */
export function chooseTile(cuda: Cuda, among: readonly Tile[], blocks: (tile: Tile) => number): Tile {
  const time = (tile: Tile) => timeOf(cuda, tile, blocks(tile))
  const tile =
    among.find(({ name }) => name === choice.tile) ??
    among.reduce((best, tile) => (time(tile) < time(best) ? tile : best))
  choice.taken.tile = tile.name
  return tile
}

export const countTiles = (tile: Tile, m: number, n: number) => Math.ceil(m / tile.m) * Math.ceil(n / tile.n)

/** Sizes of c = a b: a is [m, k] ([k, m] if transposed), b is [k, n] ([n, k]), with `batch` contiguous matrices of each. */
export interface Product {
  readonly m: number
  readonly n: number
  readonly k: number
  readonly transposeA: boolean
  readonly transposeB: boolean
  readonly batch?: number
  /** Computes c += a b. */
  readonly add?: boolean
}

export type Multiply = (precision: WidePrecision, c: number, a: Matrix, b: Matrix, product: Product) => void

/** Rows per block of the few-row kernels (few-rows.cuh), which read the weight directly and once. */
export const mostFewRows = 8

/** Minimum length of k per part; splitting further does not pay. */
const leastPart = 512
const mostParts = 16

/** The number of parts into which k is split if there are few tiles and k is long. `sumOfParts` then adds their results in order. */
export function partsOfK(cuda: Cuda, blocks: number, k: number): number {
  const most = Math.min(Math.floor(cuda.multiprocessors / blocks), Math.floor(k / leastPart), mostParts)
  choice.taken.parts = choice.parts ?? Math.max(1, most)
  return choice.taken.parts
}

/** c (+)= the sum of `parts` contiguous results of `size` numbers. */
export function sumOfParts(cuda: Cuda) {
  const sum = cuda.kernel('matmul', 'moe_matmul_sum_f32', 'p p l i i')
  return (c: number, results: number, size: number, parts: number, add: boolean): void => {
    const grid = Math.min(Math.ceil(size / 256), cuda.multiprocessors * 16)
    sum({ grid, block: 256 }, c, results, size, parts, +add)
  }
}

/** The dense product with contiguous c: by cuBLASLt if enabled, otherwise by our own kernels. */
export function gemm(cuda: Cuda): Multiply {
  const multiply = ownGemm(cuda)
  const { cublasLt } = cuda
  return (precision, c, a, b, product) => {
    const { m, n, k, batch = 1, add = false } = product
    const own = (to: number, adds: boolean) => multiply(precision, to, a, b, { ...product, add: adds })
    if (cublasLt === undefined || batch * m * n * k === 0) own(c, add)
    else cublasLt.multiply(precision, c, a, b, product, own)
  }
}

function ownGemm(cuda: Cuda): Multiply {
  const kernels = new Map(
    [...tiles.f32, ...tiles.bf16].flatMap(({ name }) =>
      ['nn', 'nt', 'tn', 'tt'].map(form => {
        const variant = `${name}_${form}`
        return [variant, cuda.kernel('matmul', `moe_matmul_${variant}`, 'p p p i i i i i i')]
      }),
    ),
  )
  const sum = sumOfParts(cuda)
  const hopper = cuda.onHopper('matmul') ? hopperProduct(cuda) : undefined
  return (precision, c, a, b, { m, n, k, transposeA, transposeB, batch = 1, add = false }) => {
    const onHopper = hopper !== undefined && precision === 'bf16' && k > 0
    const form = (transposeA ? 't' : 'n') + (transposeB ? 't' : 'n')
    const among = onHopper ? tilesOfForm(form) : tiles[precision]
    const tile = chooseTile(cuda, among, t => batch * countTiles(t, m, n))
    const blocks = batch * countTiles(tile, m, n)
    const parts = partsOfK(cuda, blocks, k)
    const size = batch * m * n
    const results = parts > 1 ? cuda.scratch(parts * size * 4).pointer : c
    const addAtOnce = +(add && parts === 1)
    if (onHopper) {
      hopper(tile, form, results, a, b, { m, n, k, batch, parts, add: addAtOnce })
    } else {
      const launch = { grid: [blocks, 1, parts], block: tile.threads, shared: tile.shared }
      const kernel = kernels.get(`${tile.name}_${form}`)
      kernel?.(launch, results, a.pointer, b.pointer, m, n, k, a.ld, b.ld, addAtOnce)
    }
    if (parts > 1) sum(c, results, size, parts, add)
  }
}
