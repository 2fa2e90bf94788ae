/** @file One matrix product per expert over ragged row ranges, and the gradient of the experts' weights. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const groupedMatmul: FusedFactory<'groupedMatmul'> = native => {
  const product = native.kernel('moe_grouped_matmul_fwd_f32')
  return ([x, weight, offsets], { transposeW, precision }, [spec]) => {
    const y = native.output(spec)
    const [rows, k] = x.shape
    const bf16 = precision === 'bf16' ? 1 : 0
    const addresses = [y.pointer, pointerOf(x), pointerOf(weight), pointerOf(offsets)]
    product(...addresses, rows, weight.shape[0], k, spec.shape[1], +transposeW, bf16)
    return [y]
  }
}

export const groupedMatmulWeightGrad: FusedFactory<'groupedMatmulWeightGrad'> = native => {
  const product = native.kernel('moe_grouped_matmul_bwd_f32')
  return ([x, dy, offsets], { precision }, [spec]) => {
    const dweight = native.output(spec)
    const [experts, n, k] = spec.shape
    const addresses = [dweight.pointer, pointerOf(x), pointerOf(dy), pointerOf(offsets)]
    product(...addresses, x.shape[0], experts, k, n, precision === 'bf16' ? 1 : 0)
    return [dweight]
  }
}
