/** @file Reduces the elements of several ranks to one. Not an op of the backend contract, but used by ranks on devices (interop.ts). */
import { MoeError } from '@moe/core'
import { type Cuda, elementwiseGrid } from '../../native.ts'

/** Reductions, as the kernel numbers them. */
const reductions = { sum: 0, mean: 1, max: 2 } as const

/** Maximum number of ranks, as in the kernel. */
const mostRanks = 256

/** Creates `CudaInterop.reduceRanks`. */
export function reduceRanks(cuda: Cuda) {
  const kernelOf = (dtype: string) => cuda.kernel('reduce-ranks', `moe_reduce_ranks_${dtype}`, 'p p[256] i i l')
  const kernels = { f32: kernelOf('f32'), bf16: kernelOf('bf16'), i32: kernelOf('i32') }
  return (
    to: number,
    parts: readonly number[],
    length: number,
    dtype: keyof typeof kernels,
    reduction: keyof typeof reductions,
  ): void => {
    if (parts.length > mostRanks) {
      const problem = `there are ${parts.length} ranks, and the kernel takes ${mostRanks}`
      throw new MoeError({ code: 'E_CONFIG', op: 'reduceRanks', problem, fix: 'reduce within groups of ranks first' })
    }
    const shape = { grid: elementwiseGrid(cuda, length), block: 256 }
    kernels[dtype](shape, to, parts, parts.length, reductions[reduction], length)
  }
}
