/** @file Cross-entropy of logits with class indices. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const crossEntropy: FusedFactory<'crossEntropy'> = cuda => {
  const forward = cuda.kernel('cross-entropy', 'moe_cross_entropy_fwd_f32', 'p p p p i i')
  return ([logits, targets], { ignoreIndex }, [lossSpec, lseSpec]) => {
    const loss = cuda.output(lossSpec)
    const lse = cuda.output(lseSpec)
    const [rows, classes] = logits.shape
    const pointers = [loss.pointer, lse.pointer, pointerOf(logits), pointerOf(targets)]
    forward({ grid: rows, block: 256 }, ...pointers, classes, ignoreIndex)
    return [loss, lse]
  }
}

export const crossEntropyBackward: FusedFactory<'crossEntropyBackward'> = cuda => {
  const backward = cuda.kernel('cross-entropy', 'moe_cross_entropy_bwd_f32', 'p p p p p i i')
  return ([logits, targets, lse, dloss], { ignoreIndex }, [spec]) => {
    const dlogits = cuda.output(spec)
    const [rows, classes] = logits.shape
    const pointers = [dlogits.pointer, pointerOf(logits), pointerOf(targets), pointerOf(lse), pointerOf(dloss)]
    backward({ grid: rows, block: 256 }, ...pointers, classes, ignoreIndex)
    return [dlogits]
  }
}
