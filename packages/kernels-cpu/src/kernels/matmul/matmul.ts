/** @file Matrix products of rank 2 and batched ones of rank 3. */
import type { PrimitiveFactory } from '../../native.ts'
import { withOperands } from '../fp8-operand/fp8-operand.ts'

export const matmul: PrimitiveFactory<'matmul'> = native => {
  const product = native.kernel('moe_matmul_f32')
  const operands = withOperands(native)
  return ([a, b], { transposeA, transposeB, precision }, [spec]) => {
    const c = native.output(spec)
    const rank = spec.shape.length
    const m = spec.shape[rank - 2]
    const n = spec.shape[rank - 1]
    const k = a.shape[transposeA ? rank - 2 : rank - 1]
    const batch = rank === 3 ? spec.shape[0] : 1
    const both = [
      { value: a, along: !transposeA },
      { value: b, along: transposeB },
    ]
    operands(precision, both, (pointers, bf16) => {
      const rounded = precision === 'bf16' ? native.rounded(b) : 0
      product(c.pointer, ...pointers, rounded, batch, m, n, k, +transposeA, +transposeB, bf16)
    })
    return [c]
  }
}
