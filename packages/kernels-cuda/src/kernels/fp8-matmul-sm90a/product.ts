/** @file Products in fp8 on Hopper: dense, one per expert, and the gradient of the experts' weights. */
import type { Cuda } from '../../native.ts'
import type { Fp8Operand } from '../fp8-operand/fp8-operand.ts'
import { countTiles, partsOfK, sumOfParts, type Tile } from '../matmul/gemm.ts'
import { type Fp8Codes, fp8AsCodes } from './codes.ts'

/** TileFp8 of gemm-fp8.cuh. */
const tile: Tile = {
  name: '128x128',
  m: 128,
  n: 128,
  threads: 288,
  shared: 6 * (128 * 128 + 128 * 128 + 128 * 4) + 1024,
  speed: 1,
}

const mapOf = (cuda: Cuda, { pointer, matrices, outer, k, ld }: Fp8Codes) =>
  cuda.tensorMap({ pointer, matrices, rows: outer, columns: k, ld, boxRows: tile.m, elementBytes: 1 })

const launchOf = (cuda: Cuda, jobs: number) => ({
  grid: Math.min(jobs, cuda.multiprocessors),
  block: tile.threads,
  shared: tile.shared,
})

const kernelOf = (cuda: Cuda, name: string, signature: string) => {
  const kernel = cuda.kernel('fp8-matmul-sm90a', name, signature)
  return (jobs: number, to: number, a: Fp8Codes, b: Fp8Codes, ...rest: number[]): void => {
    const maps = [mapOf(cuda, a), mapOf(cuda, b)]
    kernel(launchOf(cuda, jobs), to, ...maps, a.scales, b.scales, a.ldScales, b.ldScales, ...rest)
  }
}

/** c `[m, n]` = a `[m, k]` times b `[n, k]` transposed, k > 0. */
export function fp8Product(cuda: Cuda) {
  const product = kernelOf(cuda, 'moe_fp8_matmul_sm90a', 'p t t p p i i i i i i i')
  const codesOf = fp8AsCodes(cuda)
  const sum = sumOfParts(cuda)
  return (c: number, left: Fp8Operand, right: Fp8Operand): void => {
    const [a, b] = [codesOf(left), codesOf(right)]
    const [m, n, k] = [a.outer, b.outer, a.k]
    const tiles = countTiles(tile, m, n)
    const parts = partsOfK(cuda, tiles, k)
    const results = parts > 1 ? cuda.scratch(parts * m * n * 4).pointer : c
    product(parts * tiles, results, a, b, m, n, k, parts, 0)
    if (parts > 1) sum(c, results, m * n, parts, false)
  }
}

/** y `[rows, n]` = x `[rows, k]` times the weight `[n, k]` of each row's expert, transposed, k > 0. */
export function fp8Grouped(cuda: Cuda) {
  const product = kernelOf(cuda, 'moe_fp8_grouped_matmul_sm90a', 'p t t p p i i p i i i i')
  const codesOf = fp8AsCodes(cuda)
  return (y: number, left: Fp8Operand, right: Fp8Operand, offsets: number): void => {
    const [x, weight] = [codesOf(left), codesOf(right)]
    const [rows, n, experts] = [x.outer, weight.outer, weight.matrices]
    const jobs = Math.min(rows, Math.ceil(rows / tile.m) + experts) * Math.ceil(n / tile.n)
    product(jobs, y, x, weight, offsets, rows, n, x.k, experts)
  }
}

/** dweight `[experts, n, k]` = dy^T x over the rows of each expert: operands with offsets. */
export function fp8WeightGradient(cuda: Cuda) {
  const product = kernelOf(cuda, 'moe_fp8_grouped_matmul_bwd_sm90a', 'p t t p p i i p i i i i')
  const codesOf = fp8AsCodes(cuda)
  return (dweight: number, left: Fp8Operand, right: Fp8Operand, offsets: number, experts: number): void => {
    const [dy, x] = [codesOf(left), codesOf(right)]
    const jobs = experts * countTiles(tile, dy.outer, x.outer)
    product(jobs, dweight, dy, x, offsets, dy.k / tile.m, dy.outer, x.outer, experts)
  }
}
