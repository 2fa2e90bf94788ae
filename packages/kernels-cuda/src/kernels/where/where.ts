/** @file Elementwise selection with numpy broadcasting. */
import { sizeOf } from '@moe/core'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'
import { broadcastNest } from '../binary/nest.ts'

export const where: PrimitiveFactory<'where'> = cuda => {
  const kernel = cuda.kernel('where', 'moe_where_b32', 'p p p p l i l[32]')
  return ([condition, a, b], _attrs, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(spec.shape)
    const nest = broadcastNest(spec.shape, condition.shape, a.shape, b.shape)
    const launch = { grid: elementwiseGrid(cuda, n), block: 256 }
    kernel(launch, y.pointer, pointerOf(condition), pointerOf(a), pointerOf(b), n, ...nest)
    return [y]
  }
}
