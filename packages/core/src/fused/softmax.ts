/** @file Softmax over the last axis. */
import { needDtype, shapeError } from '../checks.ts'
import { full } from '../create.ts'
import { where } from '../primitives.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

/**
 * The maximum of each row as a constant, or 0 for rows that are -Infinity everywhere, so that subtracting it never
 * gives NaN.
 */
export function rowMax(x: Tensor): Tensor {
  const max = x.detach().max(-1, true)
  return where(max.eq(Number.NEGATIVE_INFINITY), full([], 0, max), max)
}

export const softmaxDefinition: FusedDefinition<'softmax'> = {
  name: 'softmax',
  infer([x]) {
    needDtype('softmax', 'input', x, 'f32')
    if (x.rank === 0) throw shapeError('softmax', 'x is a scalar, which has no last axis', 'pass x [..., D]')
    return [x]
  },
  decompose([x]) {
    const e = x.sub(rowMax(x)).exp()
    return [e.div(e.sum(-1, true).maximum(1e-37))]
  },
  vjp: ({ outputs: [y] }, [dy]) => [dy === null ? null : runFused(softmaxBackwardDefinition, [y, dy], {})[0]],
}

export const softmaxBackwardDefinition: FusedDefinition<'softmaxBackward'> = {
  name: 'softmaxBackward',
  infer: ([y]) => [y],
  decompose: ([y, dy]) => [y.mul(dy.sub(y.mul(dy).sum(-1, true)))],
  vjp: null,
}

/**
 * Returns exp(x) / sum(exp(x)) over the last axis, in the shape of `x [..., D]`. Rows that are -Infinity everywhere
 * give zeros.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function softmax(x: Tensor): Tensor {
  return runFused(softmaxDefinition, [x], {})[0]
}
