/** @file One matrix product per expert over ragged row ranges, and the gradient of the experts' weights. */
import { type FusedFactory, pointerOf } from '../../native.ts'
import { withOperands } from '../fp8-operand/fp8-operand.ts'

export const groupedMatmul: FusedFactory<'groupedMatmul'> = native => {
  const product = native.kernel('moe_grouped_matmul_fwd_f32')
  const operands = withOperands(native)
  return ([x, weight, offsets], { transposeW, precision }, [spec]) => {
    const y = native.output(spec)
    const [rows, k] = x.shape
    const experts = weight.shape[0]
    const both = [
      { value: x, along: true },
      { value: weight, along: transposeW, runs: experts },
    ]
    operands(precision, both, (pointers, bf16) => {
      const rounded = precision === 'bf16' ? native.rounded(weight) : 0
      product(y.pointer, ...pointers, rounded, pointerOf(offsets), rows, experts, k, spec.shape[1], +transposeW, bf16)
    })
    return [y]
  }
}

export const groupedMatmulWeightGrad: FusedFactory<'groupedMatmulWeightGrad'> = native => {
  const product = native.kernel('moe_grouped_matmul_bwd_f32')
  const operands = withOperands(native)
  return ([x, dy, offsets], { precision }, [spec]) => {
    const dweight = native.output(spec)
    const [experts, n, k] = spec.shape
    const both = [x, dy].map(value => ({ value, along: false, runs: experts, offsets }))
    operands(precision, both, (pointers, bf16) => {
      product(dweight.pointer, ...pointers, pointerOf(offsets), x.shape[0], experts, k, n, bf16)
    })
    return [dweight]
  }
}
