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
 * @param axes names of the axes, for the message
 * @throws MoeError E_ATTR if it is not a tensor, E_SHAPE if the number of axes differs
 * @internal
 */
export function needAxes(op: string, x: Tensor, axes: readonly string[]): void {
  needTensor(op, 'the input', x)
  if (x.rank !== axes.length)
    throw shapeError(op, `the input has shape ${showShape(x.shape)}, expected [${axes.join(', ')}]`, 'reshape it')
}
