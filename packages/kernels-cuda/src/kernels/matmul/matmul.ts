/** @file Matrix products of rank 2 and batched ones of rank 3. */
import { mostBlocks } from '../../modules.ts'
import { type PrimitiveFactory, pointerOf } from '../../native.ts'
import { fp8Product } from '../fp8-matmul-sm90a/product.ts'
import { fp8AsBf16 } from '../fp8-operand/fp8-operand.ts'
import { gemm, mostFewRows } from './gemm.ts'
import { operands, roundToBf16, wholeMatrix } from './operands.ts'

export const matmul: PrimitiveFactory<'matmul'> = cuda => {
  const multiply = gemm(cuda)
  const round = roundToBf16(cuda)
  const inFp8 = fp8AsBf16(cuda)
  const inFp8OnHopper = cuda.onHopper('fp8-matmul') ? fp8Product(cuda) : undefined
  const few = {
    f32: cuda.kernel('matmul', 'moe_matmul_few_f32', 'p p p i i i'),
    bf16: cuda.kernel('matmul', 'moe_matmul_few_bf16', 'p p p i i i'),
  }
  const fewColumns = {
    f32: cuda.kernel('matmul', 'moe_matmul_few_columns_f32', 'p p p i i i'),
    bf16: cuda.kernel('matmul', 'moe_matmul_few_columns_bf16', 'p p p i i i'),
  }
  return ([a, b], { transposeA, transposeB, precision }, [spec]) => {
    const c = cuda.output(spec)
    const rank = spec.shape.length
    const [m, n] = spec.shape.slice(-2)
    const k = a.shape[transposeA ? rank - 2 : rank - 1]
    const batch = rank === 3 ? spec.shape[0] : 1
    if (batch * m * n === 0) return [c]
    if (precision === 'fp8') {
      const [left, right] = [
        { value: a, along: !transposeA },
        { value: b, along: transposeB },
      ]
      if (inFp8OnHopper !== undefined && k > 0) inFp8OnHopper(c.pointer, left, right)
      else multiply('bf16', c.pointer, inFp8(left), inFp8(right), { m, n, k, transposeA, transposeB })
      return [c]
    }
    // With few rows, the time is that of reading b.
    if (m <= mostFewRows && !transposeA && batch <= mostBlocks[2]) {
      const sizes = [m, n, k]
      if (transposeB && k % 4 === 0) {
        few[precision](
          { grid: [Math.ceil(n / 4), 1, batch], block: 128 },
          c.pointer,
          pointerOf(a),
          pointerOf(b),
          ...sizes,
        )
        return [c]
      }
      const blocks = Math.ceil(n / 128)
      if (!transposeB && n % 4 === 0 && (k <= 512 || batch * blocks >= cuda.multiprocessors)) {
        fewColumns[precision]({ grid: [blocks, 1, batch], block: 128 }, c.pointer, pointerOf(a), pointerOf(b), ...sizes)
        return [c]
      }
    }
    const [left, right] = operands(
      round,
      precision,
      [a, b].map(x => wholeMatrix(x, batch * x.shape[rank - 2], x.shape[rank - 1])),
    )
    multiply(precision, c.pointer, left, right, { batch, m, n, k, transposeA, transposeB })
    return [c]
  }
}
