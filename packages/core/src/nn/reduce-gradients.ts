/** @file Gradients that several ranks have a part of. */
import type { Tensor } from '../tensor.ts'
import type { Parameter } from './parameter.ts'

/** Gradients are handed over up to so many elements at a time: more would be in memory twice. */
const groupElements = 1 << 22

/**
 * Replaces the gradients of parameters by what `reduce` makes of them, such as their sums over all ranks. Those without one are left out. Groups are the same wherever the same
 * parameters have gradients.
 * @param reduce resolves to as many tensors, of the same shapes, which become the parameters', or to nothing where it has put them in the place of those given
 */
export async function reduceGradients(
  parameters: readonly Parameter[],
  reduce: (gradients: readonly Tensor[]) => Promise<readonly Tensor[] | undefined>,
): Promise<void> {
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
