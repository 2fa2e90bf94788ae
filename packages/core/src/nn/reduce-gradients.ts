/** @file Reduces gradients over several ranks. */
import { needList } from '../checks.ts'
import type { Parameter } from '../parameter.ts'
import type { Tensor } from '../tensor.ts'

/** Maximum number of elements that are passed to `reduce` at a time, because these are in memory twice. */
const groupElements = 1 << 22

/**
 * Replaces the gradients of parameters by the result of `reduce`, for example their sums over all ranks. Parameters
 * without a gradient are skipped. Gradients are passed in groups, which are the same on all ranks if the same
 * parameters have gradients.
 * @param reduce resolves to as many tensors of the same shapes, which become the parameters' gradients, or to undefined
 * if it has changed the gradients in place
 */
export async function reduceGradients(
  parameters: readonly Parameter[],
  reduce: (gradients: readonly Tensor[]) => Promise<readonly Tensor[] | undefined>,
): Promise<void> {
  needList('reduceGradients', 'the first argument', parameters, 'pass an array of parameters')
  const left = parameters.filter(({ grad }) => grad !== null)
  while (left.length > 0) {
    const group: Parameter[] = []
    for (let elements = 0; left.length > 0 && elements < groupElements; elements += (group.at(-1) as Parameter).size)
      group.push(left.shift() as Parameter)
    const reduced = await reduce(group.map(({ grad }) => grad as Tensor))
    for (const [i, parameter] of reduced === undefined ? [] : group.entries()) {
      parameter.zeroGrad()
      parameter.grad = (reduced as readonly Tensor[])[i]
    }
  }
}
