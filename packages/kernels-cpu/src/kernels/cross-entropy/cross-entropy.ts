/** @file Cross-entropy of logits with class indices. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const crossEntropy: FusedFactory<'crossEntropy'> = native => {
  const forward = native.kernel('moe_cross_entropy_fwd_f32')
  return ([logits, targets], { ignoreIndex }, [lossSpec, lseSpec]) => {
    const loss = native.output(lossSpec)
    const lse = native.output(lseSpec)
    const [rows, classes] = logits.shape
    forward(loss.pointer, lse.pointer, pointerOf(logits), pointerOf(targets), rows, classes, ignoreIndex)
    return [loss, lse]
  }
}

export const crossEntropyBackward: FusedFactory<'crossEntropyBackward'> = native => {
  const backward = native.kernel('moe_cross_entropy_bwd_f32')
  return ([logits, targets, lse, dloss], { ignoreIndex }, [spec]) => {
    const dlogits = native.output(spec)
    const [rows, classes] = logits.shape
    const addresses = [dlogits.pointer, pointerOf(logits), pointerOf(targets), pointerOf(lse), pointerOf(dloss)]
    backward(...addresses, rows, classes, ignoreIndex)
    return [dlogits]
  }
}
