/** @file Intermediate results that were freed although the backward pass needs them, and how to recompute each. */
import { disposeRecorded, withReshapes } from '../tape.ts'
import type { Tensor } from '../tensor.ts'

const makers = new WeakMap<Tensor, () => void>()

/** Recomputes a tensor that was discarded. Other tensors stay as they are. */
export function restore(tensor: Tensor): void {
  if (tensor.handle === null) makers.get(tensor)?.()
}

/**
 * Runs `use`, then frees the tensors in `discardable` and all their reshapes, except those in the result. `restore` recomputes
 * them.
 * @param again recomputes these tensors
 */
export function useAndDiscard<T>(discardable: readonly Tensor[], again: () => readonly Tensor[], use: () => T): T {
  const { result, tensors } = withReshapes(discardable, use)
  const returned: readonly unknown[] = Array.isArray(result) ? result : [result]
  for (const [i, tensor] of [...tensors].entries()) {
    const { node } = tensor
    if (node === null || tensor.handle === null || returned.includes(tensor)) continue
    const [base] = node.inputs
    makers.set(tensor, () => take(tensor, i < discardable.length ? again()[i] : restored(base)))
    disposeRecorded(tensor)
  }
  return result
}

function restored(tensor: Tensor): Tensor {
  restore(tensor)
  return tensor
}

/** Gives a discarded tensor the elements of another tensor with the same number of elements. */
function take(tensor: Tensor, from: Tensor): void {
  tensor.handle = tensor.backend.primitives.reshape([from], {}, [tensor])[0]
  tensor.temporary = false
}
