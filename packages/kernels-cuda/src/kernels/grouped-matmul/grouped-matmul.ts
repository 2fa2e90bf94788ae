/** @file One matrix product per expert over ragged row ranges, and the gradient of the experts' weights. */
import type { WidePrecision } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { fp8Grouped, fp8WeightGradient } from '../fp8-matmul-sm90a/product.ts'
import { fp8AsBf16 } from '../fp8-operand/fp8-operand.ts'
import { hopperGrouped, hopperWeightGradient, type Sizes } from '../grouped-matmul-sm90a/product.ts'
import { mostFewRows } from '../matmul/gemm.ts'
import { operands, roundToBf16, wholeMatrix } from '../matmul/operands.ts'
import { chooseTile, countTiles, type Tile, tiles } from '../matmul/tiles.ts'

/** Maximum number of rows for the few-row kernels, which read weights in f32; k must be a multiple of 4. */
export const isFew = (rows: number, experts: number) => rows <= Math.min(mostFewRows * experts, 4096)

const variants = [...tiles.f32, ...tiles.bf16].map(tile => tile.name)

/** Maximum number of row tiles: every expert may start one, and so may the rows after the last one. None of the sizes is zero. */
export const mostRowTiles = (rows: number, experts: number, size: number) =>
  Math.min(rows, Math.ceil(rows / size) + experts)

/** y `[rows, n]` = x `[rows, k]` times the weight of each row's expert, `[experts, k, n]` or transposed `[experts, n, k]`. */
export function multiplyGroups(cuda: Cuda) {
  const onHopper = cuda.onHopper('grouped-matmul') ? hopperGrouped(cuda) : undefined
  const kernels = new Map(
    variants.flatMap(tile =>
      ['n', 't'].map(form => {
        const variant = `${tile}_${form}`
        return [variant, cuda.kernel('grouped-matmul', `moe_grouped_matmul_fwd_${variant}`, 'p p p p i i i i i i')]
      }),
    ),
  )
  type Product = Sizes & { readonly transposeW: boolean }
  return (precision: WidePrecision, y: number, x: Matrix, weight: Matrix, offsets: number, product: Product): void => {
    const { rows, n, k, experts, transposeW } = product
    if (onHopper !== undefined && precision === 'bf16' && k * experts > 0) {
      onHopper(y, x, weight, offsets, product)
      return
    }
    const most = (tile: Tile) => mostRowTiles(rows, experts, tile.m) * Math.ceil(n / tile.n)
    const tile = chooseTile(cuda, tiles[precision], most)
    const launch = { grid: most(tile), block: tile.threads, shared: tile.shared }
    const kernel = kernels.get(`${tile.name}_${transposeW ? 't' : 'n'}`)
    kernel?.(launch, y, x.pointer, weight.pointer, offsets, rows, n, k, experts, x.ld, weight.ld)
  }
}

export const groupedMatmul: FusedFactory<'groupedMatmul'> = cuda => {
  const multiply = multiplyGroups(cuda)
  const round = roundToBf16(cuda)
  const inFp8 = fp8AsBf16(cuda)
  const inFp8OnHopper = cuda.onHopper('fp8-matmul') ? fp8Grouped(cuda) : undefined
  const few = {
    f32: cuda.kernel('grouped-matmul', 'moe_grouped_matmul_few_f32', 'p p p p i i i i'),
    bf16: cuda.kernel('grouped-matmul', 'moe_grouped_matmul_few_bf16', 'p p p p i i i i'),
  }
  return ([x, weight, offsets], { transposeW, precision }, [spec]) => {
    const y = cuda.output(spec)
    const [rows, n] = spec.shape
    const k = x.shape[1]
    const [experts, weightRows, weightColumns] = weight.shape
    if (rows * n === 0) return [y]
    const at = pointerOf(offsets)
    const product = { rows, n, k, experts, transposeW }
    if (precision === 'fp8') {
      const [left, right] = [
        { value: x, along: true },
        { value: weight, along: transposeW, runs: experts },
      ]
      if (inFp8OnHopper !== undefined && k * experts > 0) inFp8OnHopper(y.pointer, left, right, at)
      else multiply('bf16', y.pointer, inFp8(left), inFp8(right), at, product)
      return [y]
    }
    if (transposeW && k % 4 === 0 && isFew(rows, experts)) {
      const launch = { grid: [Math.ceil(n / 4), mostRowTiles(rows, experts, mostFewRows)], block: 128 }
      few[precision](launch, y.pointer, pointerOf(x), pointerOf(weight), at, rows, n, k, experts)
      return [y]
    }
    const [left, right] = operands(round, precision, [
      wholeMatrix(x, rows, k),
      wholeMatrix(weight, experts * weightRows, weightColumns),
    ])
    multiply(precision, y.pointer, left, right, at, product)
    return [y]
  }
}

/** dweight `[experts, n, k]` = dy^T x over the rows of each expert. */
export function weightGradient(cuda: Cuda) {
  const kernels = new Map(
    variants.map(tile => [tile, cuda.kernel('grouped-matmul', `moe_grouped_matmul_bwd_${tile}`, 'p p p p i i i i')]),
  )
  type Sizes = { readonly n: number; readonly k: number; readonly experts: number }
  return (precision: WidePrecision, dweight: number, dy: Matrix, x: Matrix, offsets: number, sizes: Sizes): void => {
    const { n, k, experts } = sizes
    const tile = chooseTile(cuda, tiles[precision], t => experts * countTiles(t, n, k))
    kernels.get(tile.name)?.(
      { grid: [countTiles(tile, n, k), experts], block: tile.threads, shared: tile.shared },
      dweight,
      dy.pointer,
      x.pointer,
      offsets,
      n,
      k,
      dy.ld,
      x.ld,
    )
  }
}

export const groupedMatmulWeightGrad: FusedFactory<'groupedMatmulWeightGrad'> = cuda => {
  const multiply = weightGradient(cuda)
  const onHopper = cuda.onHopper('grouped-matmul') ? hopperWeightGradient(cuda) : undefined
  const round = roundToBf16(cuda)
  const inFp8 = fp8AsBf16(cuda)
  const inFp8OnHopper = cuda.onHopper('fp8-matmul') ? fp8WeightGradient(cuda) : undefined
  return ([x, dy, offsets], { precision }, [spec]) => {
    const dweight = cuda.output(spec)
    const [experts, n, k] = spec.shape
    if (experts * n * k === 0) return [dweight]
    const rows = x.shape[0]
    const at = pointerOf(offsets)
    if (precision === 'fp8') {
      const [left, right] = [dy, x].map(value => ({ value, along: false, runs: experts, offsets }))
      if (inFp8OnHopper !== undefined) inFp8OnHopper(dweight.pointer, left, right, at, experts)
      else multiply('bf16', dweight.pointer, inFp8(left), inFp8(right), at, { n, k, experts })
      return [dweight]
    }
    if (onHopper !== undefined && precision === 'bf16') {
      onHopper(dweight.pointer, pointerOf(dy), pointerOf(x), at, { rows, n, k, experts })
      return [dweight]
    }
    const [left, right] = operands(round, precision, [wholeMatrix(dy, rows, n), wholeMatrix(x, rows, k)])
    multiply(precision, dweight.pointer, left, right, at, { n, k, experts })
    return [dweight]
  }
}
