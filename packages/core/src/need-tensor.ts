/** @file The first checks of a user's call: that inputs are tensors, with the expected number of axes. */
import { describe } from './errors.ts'
import { attrError, shapeError } from './infer.ts'
import { showShape } from './shape.ts'
import type { Tensor } from './tensor.ts'

/** Checks that `value` is a tensor. Internal. @throws MoeError E_ATTR */
export function needTensor(op: string, name: string, value: Tensor | null | undefined): void {
  // Anything with a backend counts as a tensor: every op runs this check, so it must be cheap.
  if (value?.backend !== undefined) return
  const fix = 'pass a tensor, such as tensor(numbers, shape)'
  throw attrError(op, `${name} is ${describe(value)}, not a tensor`, fix)
}

/**
 * Checks that the input of a module is a tensor with the given axes.
 * @param axes the size of each axis, or its name (for the message) if any size will do
 * @throws MoeError E_ATTR if it is not a tensor, E_SHAPE if its shape does not fit
 * @internal
 */
export function needAxes(op: string, x: Tensor, axes: ReadonlyArray<string | number>): void {
  needTensor(op, 'the input', x)
  const isSameRank = x.rank === axes.length
  if (isSameRank && axes.every((axis, i) => typeof axis === 'string' || axis === x.shape[i])) return
  throw shapeError(
    op,
    `the input has shape ${showShape(x.shape)}, expected [${axes.join(', ')}]`,
    isSameRank ? 'create the module with the size of the input' : 'reshape it',
  )
}
