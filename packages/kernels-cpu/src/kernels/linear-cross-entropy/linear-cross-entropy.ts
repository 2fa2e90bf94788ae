/** @file Cross-entropy of the logits x weight^T, which never exist as a whole. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const linearCrossEntropy: FusedFactory<'linearCrossEntropy'> = native => {
  const forward = native.kernel('moe_linear_cross_entropy_fwd_f32')
  return ([x, weight, targets], { ignoreIndex, precision }, [lossSpec, lseSpec]) => {
    const loss = native.output(lossSpec)
    const lse = native.output(lseSpec)
    const [rows, dim] = x.shape
    const addresses = [loss.pointer, lse.pointer, pointerOf(x), pointerOf(weight), pointerOf(targets)]
    forward(...addresses, rows, weight.shape[0], dim, ignoreIndex, precision === 'bf16' ? 1 : 0)
    return [loss, lse]
  }
}

export const linearCrossEntropyBackward: FusedFactory<'linearCrossEntropyBackward'> = native => {
  const backward = native.kernel('moe_linear_cross_entropy_bwd_f32')
  return ([x, weight, targets, lse, dloss], { ignoreIndex, precision }, [dxSpec, dweightSpec]) => {
    const dx = native.output(dxSpec)
    const dweight = native.output(dweightSpec)
    const [rows, dim] = x.shape
    const inputs = [pointerOf(x), pointerOf(weight), pointerOf(targets), pointerOf(lse), pointerOf(dloss)]
    backward(
      dx.pointer,
      dweight.pointer,
      ...inputs,
      rows,
      weight.shape[0],
      dim,
      ignoreIndex,
      precision === 'bf16' ? 1 : 0,
    )
    return [dx, dweight]
  }
}
