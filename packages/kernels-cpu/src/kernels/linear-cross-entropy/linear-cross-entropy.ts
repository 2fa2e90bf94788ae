/** @file Cross-entropy of the logits x weight^T, without storing all of them. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const linearCrossEntropy: FusedFactory<'linearCrossEntropy'> = native => {
  const forward = native.kernel('moe_linear_cross_entropy_fwd_f32')
  return ([x, weight, targets], { ignoreIndex, precision }, [lossSpec, lseSpec]) => {
    const loss = native.output(lossSpec)
    const lse = native.output(lseSpec)
    const [rows, dim] = x.shape
    const bf16 = precision === 'bf16'
    const weights = [pointerOf(weight), bf16 ? native.rounded(weight) : 0]
    const addresses = [loss.pointer, lse.pointer, pointerOf(x), ...weights, pointerOf(targets)]
    forward(...addresses, rows, weight.shape[0], dim, ignoreIndex, +bf16)
    return [loss, lse]
  }
}

export const linearCrossEntropyBackward: FusedFactory<'linearCrossEntropyBackward'> = native => {
  const backward = native.kernel('moe_linear_cross_entropy_bwd_f32')
  return ([x, weight, targets, lse, dloss], { ignoreIndex, precision }, [dxSpec, dweightSpec]) => {
    const dx = native.output(dxSpec)
    const dweight = native.output(dweightSpec)
    const [rows, dim] = x.shape
    const bf16 = precision === 'bf16'
    const weights = [pointerOf(weight), bf16 ? native.rounded(weight) : 0]
    const inputs = [pointerOf(x), ...weights, pointerOf(targets), pointerOf(lse), pointerOf(dloss)]
    backward(dx.pointer, dweight.pointer, ...inputs, rows, weight.shape[0], dim, ignoreIndex, +bf16)
    return [dx, dweight]
  }
}
