/** @file What a user's call is asked first: whether it was given tensors, and of how many axes. */
import { describe } from './errors.ts'
import { attrError, shapeError } from './infer.ts'
import { showShape } from './shape.ts'
import type { Tensor } from './tensor.ts'

/** Internal: refuses what is no tensor. @throws MoeError E_ATTR */
export function needTensor(op: string, name: string, value: Tensor | null | undefined): void {
  // Whatever has a backend is taken for one: this is asked for every op.
  if (value?.backend !== undefined) return
  const fix = 'pass a tensor: tensor(numbers, shape) makes one'
  throw attrError(op, `${name} is ${describe(value)}, no tensor`, fix)
}

/**
 * What a module with an input of several axes asks first.
 * @param axes their names, for the message
 * @throws MoeError E_ATTR for what is no tensor, E_SHAPE for one of more or fewer axes
 * @internal
 */
export function needAxes(op: string, x: Tensor, axes: readonly string[]): void {
  needTensor(op, 'the input', x)
  if (x.rank !== axes.length)
    throw shapeError(op, `the input has shape ${showShape(x.shape)}, needs [${axes.join(', ')}]`, 'reshape it')
}
