/** @file Merged axes as arguments of kernels (nest.cuh). */
import { MoeError, type Shape } from '@moe/core'
import { broadcastNest as broadcastAxes, type Nest } from '@moe/core/strides'

/** The maximum rank, as in nest.cuh. */
const maxAxes = 8

/** Axes innermost first: for each its size, then the operands' strides. */
export function nestList({ sizes, strides }: Nest): number[] {
  checkRank(sizes.length)
  const nest: number[] = []
  for (let axis = sizes.length - 1; axis >= 0; axis--) {
    nest.push(sizes[axis])
    for (let k = 0; k < strides.length; k++) nest.push(strides[k][axis])
  }
  return nest
}

/** The kernel arguments `rank` and `nest` of an elementwise op with numpy broadcasting. */
export function broadcastNest(out: Shape, ...operands: readonly Shape[]): [rank: number, nest: number[]] {
  const [rank, ...numbers] = broadcastAxes(out, ...operands)
  return [rank, byAxis(rank, numbers)]
}

/** `numbers` are lists of length `rank`, outermost axis first. */
function byAxis(rank: number, numbers: readonly number[]): number[] {
  checkRank(rank)
  const nest: number[] = []
  for (let axis = rank - 1; axis >= 0; axis--) {
    for (let i = axis; i < numbers.length; i += rank) nest.push(numbers[i])
  }
  return nest
}

function checkRank(rank: number): void {
  if (rank <= maxAxes) return
  const problem = `${rank} axes that cannot be merged; the kernels have loops for ${maxAxes}`
  throw new MoeError({ code: 'E_BACKEND', op: 'kernels-cuda', problem })
}
