/** @file Matrix products of rank 2 and batched ones of rank 3. */
import { type PrimitiveFactory, pointerOf } from '../../native.ts'

export const matmul: PrimitiveFactory<'matmul'> = native => {
  const product = native.kernel('moe_matmul_f32')
  return ([a, b], { transposeA, transposeB, precision }, [spec]) => {
    const c = native.output(spec)
    const rank = spec.shape.length
    const m = spec.shape[rank - 2]
    const n = spec.shape[rank - 1]
    const k = a.shape[transposeA ? rank - 2 : rank - 1]
    const batch = rank === 3 ? spec.shape[0] : 1
    const bf16 = precision === 'bf16' ? 1 : 0
    product(c.pointer, pointerOf(a), pointerOf(b), batch, m, n, k, +transposeA, +transposeB, bf16)
    return [c]
  }
}
