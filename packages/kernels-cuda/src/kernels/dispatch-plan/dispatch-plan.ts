/** @file Sorts slots by expert: the plan for dispatching tokens. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

const block = 256
const warps = block / 32
/** Slots per block, a multiple of the block size: enough to amortize its table of counts, and more if there would be too many blocks. */
const leastShare = 2048
const mostBlocks = 128
/** Shared memory of a block: a count per warp and expert, and an offset per expert. */
const mostExperts = 2048

export const dispatchPlan: FusedFactory<'dispatchPlan'> = cuda => {
  const count = cuda.kernel('dispatch-plan', 'moe_dispatch_plan_count_i32', 'p p i i i')
  const place = cuda.kernel('dispatch-plan', 'moe_dispatch_plan_place_i32', 'p p p p p p i i i')
  return ([indices], { experts }, specs) => {
    if (experts > mostExperts) return undefined
    const outputs = specs.map(cuda.output)
    const slots = sizeOf(indices.shape)
    const share = Math.max(leastShare, Math.ceil(slots / mostBlocks / block) * block)
    // Without slots, one block still writes the zeros.
    const grid = Math.max(1, Math.ceil(slots / share))
    const table = cuda.scratch(grid * experts * 4)
    const sizes = [slots, share, experts]
    if (grid > 1) count({ grid, block, shared: experts * 4 }, table.pointer, pointerOf(indices), ...sizes)
    const shared = ((warps + 1) * experts + 1) * 4
    const pointers = outputs.map(({ pointer }) => pointer)
    place({ grid, block, shared }, ...pointers, pointerOf(indices), table.pointer, ...sizes)
    return outputs
  }
}
