/**
 * @file Matrix products on host memory.
 *
 * The wasm backend multiplies `[m, k] x [k, n]` with XNNPACK but falls back to a plain loop, more than ten times slower, for transposed or batched operands.
 * So operands are first copied into plain matrices, which costs m k + k n compared with m k n.
 */
import type { PrimitiveAttrs, TensorSpec, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import type { Host } from './memory.ts'
import { copyBox } from './strided.ts'

/** A matrix inside a tensor: element (r, c) is at `start + r * row + c * column`. */
export interface MatrixView {
  readonly tensor: TfTensor
  readonly start: number
  readonly row: number
  readonly column: number
  readonly rows: number
  readonly columns: number
}

/** Copies the matrix to a tensor; the caller disposes it. */
export function plainMatrix(host: Host, matrix: MatrixView): TfTensor {
  const { tensor, start, row, column, rows, columns } = matrix
  const out = host.output([rows, columns], 'float32')
  copyBox(
    [rows, columns],
    { data: host.view(tensor), start, strides: [row, column] },
    { data: host.view(out), start: 0, strides: [columns, 1] },
  )
  return out
}

/** `[m, k] x [k, n]` of plain matrices with at least one row, column and inner element. */
export function plainProduct(host: Host, a: TfTensor, b: TfTensor): TfTensor {
  return host.runner.run('BatchMatMul', { a, b }, { transposeA: false, transposeB: false })
}

/** Product of two views; the caller disposes the result. */
export function viewProduct(host: Host, a: MatrixView, b: MatrixView): TfTensor {
  if (a.rows === 0 || b.columns === 0 || a.columns === 0) {
    const out = host.output([a.rows, b.columns], 'float32')
    host.view(out).fill(0)
    return out
  }
  const left = plainMatrix(host, a)
  const right = plainMatrix(host, b)
  const out = plainProduct(host, left, right)
  left.dispose()
  right.dispose()
  return out
}

/** Below this many multiplications the plain loop is not slower than copying. */
const smallProduct = 4096

export function matmul(
  host: Host,
  [a, b]: readonly Value[],
  { transposeA, transposeB }: PrimitiveAttrs['matmul'],
  [spec]: readonly TensorSpec[],
): TfTensor[] {
  const rank = spec.shape.length
  const [m, n] = spec.shape.slice(-2)
  const batch = rank === 3 ? spec.shape[0] : 1
  const k = a.shape[rank - (transposeA ? 2 : 1)]
  const [left, right] = [tensorOf(a), tensorOf(b)]
  if (batch === 0 || m === 0 || n === 0 || k === 0) {
    const out = host.output(spec.shape, 'float32')
    host.view(out).fill(0)
    return [out]
  }
  const plain = rank === 2 && !transposeA && !transposeB
  // With few rows, the product would cost less than transposing the other operand.
  const small = m * n * k <= smallProduct || (transposeB && !transposeA && m <= 2)
  if (!host.plainProducts || plain || small) {
    return [host.runner.run('BatchMatMul', { a: left, b: right }, { transposeA, transposeB })]
  }
  const viewA = (i: number): MatrixView => {
    const [row, column] = transposeA ? [1, m] : [k, 1]
    return { tensor: left, start: i * m * k, row, column, rows: m, columns: k }
  }
  const viewB = (i: number): MatrixView => {
    const [row, column] = transposeB ? [1, k] : [n, 1]
    return { tensor: right, start: i * k * n, row, column, rows: k, columns: n }
  }
  if (rank === 2) {
    const ownA = transposeA ? plainMatrix(host, viewA(0)) : null
    const ownB = transposeB ? plainMatrix(host, viewB(0)) : null
    const out = plainProduct(host, ownA ?? left, ownB ?? right)
    ownA?.dispose()
    ownB?.dispose()
    return [out]
  }
  const out = host.output(spec.shape, 'float32')
  for (let i = 0; i < batch; i++) {
    const product = viewProduct(host, viewA(i), viewB(i))
    host.view(out).set(host.view(product), i * m * n)
    product.dispose()
  }
  return [out]
}
