/** @file One matrix product per expert over ragged row ranges, and the gradient of the experts' weights. */
import type { WidePrecision } from '@moe/core'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { fp8Grouped, fp8WeightGradient } from '../fp8-matmul-sm90a/product.ts'
import { fp8AsBf16, fp8AsCodes } from '../fp8-operand/fp8-operand.ts'
import { hopperGrouped, hopperWeightGradient } from '../grouped-matmul-sm90a/product.ts'
import {
  chooseTile,
  countTiles,
  type Matrix,
  mostFewRows,
  operands,
  roundToBf16,
  type Tile,
  tiles,
  wholeMatrix,
} from '../matmul/gemm.ts'

/** Rows for which weights are read in f32, by kernels for few rows: when k is a multiple of 4. */
export const isFew = (rows: number, experts: number) => rows <= Math.min(mostFewRows * experts, 4096)

const variants = [...tiles.f32, ...tiles.bf16].map(tile => tile.name)

export const groupedMatmul: FusedFactory<'groupedMatmul'> = cuda => {
  const round = roundToBf16(cuda)
  const inFp8 = fp8AsBf16(cuda)
  const codesOf = fp8AsCodes(cuda)
  const fp8OnHopper = cuda.wgmma ? fp8Grouped(cuda) : undefined
  const onHopper = cuda.wgmma ? hopperGrouped(cuda) : undefined
  const kernels = new Map(
    variants.flatMap(tile =>
      ['n', 't'].map(form => {
        const variant = `${tile}_${form}`
        return [variant, cuda.kernel('grouped-matmul', `moe_grouped_matmul_fwd_${variant}`, 'p p p p i i i i i i')]
      }),
    ),
  )
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
    // Every expert can begin a tile of rows, and so can the rows behind the last one; none is empty.
    const mostRowTiles = (size: number) => Math.min(rows, Math.ceil(rows / size) + experts)
    if (precision !== 'fp8' && transposeW && k % 4 === 0 && isFew(rows, experts)) {
      few[precision](
        { grid: [Math.ceil(n / 4), mostRowTiles(mostFewRows)], block: 128 },
        y.pointer,
        pointerOf(x),
        pointerOf(weight),
        pointerOf(offsets),
        rows,
        n,
        k,
        experts,
      )
      return [y]
    }
    const weightInRuns = { value: weight, along: transposeW, runs: experts }
    if (precision === 'fp8' && fp8OnHopper !== undefined && k * experts > 0) {
      fp8OnHopper(y.pointer, codesOf({ value: x, along: true }), codesOf(weightInRuns), pointerOf(offsets))
      return [y]
    }
    const [left, right] =
      precision === 'fp8'
        ? [inFp8({ value: x, along: true }), inFp8(weightInRuns)]
        : operands(round, precision, [
            wholeMatrix(x, rows, k),
            wholeMatrix(weight, experts * weightRows, weightColumns),
          ])
    const stored = precision === 'fp8' ? 'bf16' : precision
    if (onHopper !== undefined && stored === 'bf16' && k * experts > 0) {
      onHopper(y.pointer, left, right, pointerOf(offsets), { rows, n, k, experts, transposeW })
      return [y]
    }
    const most = (tile: Tile) => mostRowTiles(tile.m) * Math.ceil(n / tile.n)
    const tile = chooseTile(cuda, tiles[stored], most)
    kernels.get(`${tile.name}_${transposeW ? 't' : 'n'}`)?.(
      { grid: most(tile), block: tile.threads, shared: tile.shared },
      y.pointer,
      left.pointer,
      right.pointer,
      pointerOf(offsets),
      rows,
      n,
      k,
      experts,
      left.ld,
      right.ld,
    )
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
  const round = roundToBf16(cuda)
  const inFp8 = fp8AsBf16(cuda)
  const codesOf = fp8AsCodes(cuda)
  const fp8OnHopper = cuda.wgmma ? fp8WeightGradient(cuda) : undefined
  const onHopper = cuda.wgmma ? hopperWeightGradient(cuda) : undefined
  const multiply = weightGradient(cuda)
  return ([x, dy, offsets], { precision }, [spec]) => {
    const dweight = cuda.output(spec)
    const [experts, n, k] = spec.shape
    if (experts * n * k === 0) return [dweight]
    const rows = x.shape[0]
    if (onHopper !== undefined && precision === 'bf16') {
      onHopper(dweight.pointer, pointerOf(dy), pointerOf(x), pointerOf(offsets), { rows, n, k, experts })
      return [dweight]
    }
    if (precision === 'fp8') {
      const both = [dy, x].map(value => ({ value, along: false, runs: experts, offsets }))
      if (fp8OnHopper !== undefined) {
        const [left, right] = both.map(codesOf)
        fp8OnHopper(dweight.pointer, left, right, pointerOf(offsets), experts)
        return [dweight]
      }
      const [left, right] = both.map(inFp8)
      multiply('bf16', dweight.pointer, left, right, pointerOf(offsets), { n, k, experts })
      return [dweight]
    }
    const [left, right] = operands(round, precision, [wholeMatrix(dy, rows, n), wholeMatrix(x, rows, k)])
    multiply(precision, dweight.pointer, left, right, pointerOf(offsets), { n, k, experts })
    return [dweight]
  }
}
