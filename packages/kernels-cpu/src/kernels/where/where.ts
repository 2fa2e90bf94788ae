/** @file Elementwise selection with numpy broadcasting. */

import { broadcastNest } from '@moe/core/strides'
import { type PrimitiveFactory, pointerOf } from '../../native.ts'

export const where: PrimitiveFactory<'where'> = native => {
  const kernel = native.kernel('moe_where_b32')
  return ([condition, a, b], _attrs, [spec]) => {
    const y = native.output(spec)
    const nest = broadcastNest(spec.shape, condition.shape, a.shape, b.shape)
    kernel(y.pointer, pointerOf(condition), pointerOf(a), pointerOf(b), ...nest)
    return [y]
  }
}
