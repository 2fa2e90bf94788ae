/** @file Sorts slots by expert: the plan for dispatching tokens. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

export const dispatchPlan: FusedFactory<'dispatchPlan'> = native => {
  const kernel = native.kernel('moe_dispatch_plan_i32')
  return ([indices], { experts }, specs) => {
    const [order, positions, offsets, counts] = specs.map(native.output)
    const slots = sizeOf(indices.shape)
    kernel(order.pointer, positions.pointer, offsets.pointer, counts.pointer, pointerOf(indices), slots, experts)
    return [order, positions, offsets, counts]
  }
}
