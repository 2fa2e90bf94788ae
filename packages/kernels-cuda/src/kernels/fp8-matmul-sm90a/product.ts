/** @file Products in fp8 on Hopper: dense, one per expert, and the gradient of the experts' weights. */

import type { Matrix } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import { type Fp8Operand, tilesOfExperts } from '../fp8-operand/fp8-operand.ts'
import { sumOfParts } from '../matmul/gemm.ts'
import { countTiles, partsOfK, type Tile } from '../matmul/tiles.ts'
import { type Fp8Codes, fp8AsCodes } from './codes.ts'

/** TileFp8 in gemm-fp8.cuh. */
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

/** Maximum number of row tiles of a product per expert: every expert may start one, and so may the rows after the last expert. */
const countRowTiles = (rows: number, n: number, experts: number) =>
  tilesOfExperts(rows, experts) * Math.ceil(n / tile.n)

/** y `[rows, n]` = x `[rows, k]` times the weight `[n, k]` of each row's expert, transposed, k > 0. */
export function fp8Grouped(cuda: Cuda) {
  const product = kernelOf(cuda, 'moe_fp8_grouped_matmul_sm90a', 'p t t p p i i p i i i i')
  const codesOf = fp8AsCodes(cuda)
  return (y: number, left: Fp8Operand, right: Fp8Operand, offsets: number): void => {
    const [x, weight] = [codesOf(left), codesOf(right)]
    const [rows, n, experts] = [x.outer, weight.outer, weight.matrices]
    product(countRowTiles(rows, n, experts), y, x, weight, offsets, rows, n, x.k, experts)
  }
}

/** y `[rows, n]` in bf16 = the sum of up to two x `[rows, k]` times the weight `[n, k]` of each row's expert, transposed. */
export function fp8GroupedRounded(cuda: Cuda) {
  const signature = 'p t t t t p p p p i i i p i i i i i'
  const product = cuda.kernel('routed-experts-sm90a', 'moe_routed_experts_fp8_product_sm90a', signature)
  return (y: Matrix, pairs: ReadonlyArray<readonly [x: Fp8Codes, weight: Fp8Codes]>, offsets: number): void => {
    const [first, second = first] = pairs
    const [x, weight] = first
    const [rows, n, experts] = [x.outer, weight.outer, weight.matrices]
    const operands = [...first, ...second]
    const maps = operands.map(codes => mapOf(cuda, codes))
    const scales = operands.map(codes => codes.scales)
    const strides = [x.ldScales, weight.ldScales]
    const launch = launchOf(cuda, countRowTiles(rows, n, experts))
    product(launch, y.pointer, ...maps, ...scales, ...strides, pairs.length, offsets, rows, n, x.k, experts, y.ld)
  }
}

/** dweight `[experts, n, k]` = dy^T x over the rows of each expert, with dy `[rows, n]` and x `[rows, k]` as packed codes rounded across rows. */
export function fp8PackedWeightGradient(cuda: Cuda) {
  const product = kernelOf(cuda, 'moe_fp8_grouped_matmul_bwd_sm90a', 'p t t p p i i p i i i i')
  return (dweight: number, dy: Fp8Codes, x: Fp8Codes, offsets: number, experts: number): void => {
    const jobs = experts * countTiles(tile, dy.outer, x.outer)
    product(jobs, dweight, dy, x, offsets, dy.k / tile.m, dy.outer, x.outer, experts)
  }
}

/** The same for operands with offsets. */
export function fp8WeightGradient(cuda: Cuda) {
  const multiply = fp8PackedWeightGradient(cuda)
  const codesOf = fp8AsCodes(cuda)
  return (dweight: number, dy: Fp8Operand, x: Fp8Operand, offsets: number, experts: number): void =>
    multiply(dweight, codesOf(dy), codesOf(x), offsets, experts)
}
