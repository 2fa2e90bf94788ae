/** @file The dense product: by cuBLASLt, or by our own kernels. */
import type { WidePrecision } from '@moe/core'
import type { Matrix, Product } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import { hopperProduct, tilesOfForm } from '../matmul-sm90a/product.ts'
import { chooseTile, countTiles, partsOfK, tiles } from './tiles.ts'

export type Multiply = (precision: WidePrecision, c: number, a: Matrix, b: Matrix, product: Product) => void

/** Rows per block of the few-row kernels (few-rows.cuh), which read the weight directly and once. */
export const mostFewRows = 8

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
