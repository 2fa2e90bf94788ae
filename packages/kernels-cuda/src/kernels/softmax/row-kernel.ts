/** @file Kernels whose rows are shared out to a warp or to a block, by the rows' length. */
import type { Shape } from '@moe/core'
import { sizeOf } from '@moe/core'
import type { Cuda } from '../../native.ts'

/** Threads that share a row. A warp holds rows of up to 1024 in registers; 256 threads hold 8192 elements, and read the rest again. */
const variants = [
  { threads: 32, longest: 1024 },
  { threads: 256, longest: Number.POSITIVE_INFINITY },
]

/** Smallest block: where a row takes fewer threads, a block has several rows. */
const leastBlock = 128

export interface RowLaunch {
  /** Rows that a block works on at a time. */
  readonly rowsPerBlock: number
  readonly block: number
  readonly kernel: ReturnType<Cuda['kernel']>
}

/** `<name>_t32`, `<name>_t256`: the one for rows of `length`. */
export function rowKernel(cuda: Cuda, module: string, name: string, signature: string): (length: number) => RowLaunch {
  const launches = variants.map(({ threads, longest }) => {
    const block = Math.max(threads, leastBlock)
    const kernel = cuda.kernel(module, `${name}_t${threads}`, signature)
    return { longest, block, rowsPerBlock: block / threads, kernel }
  })
  return length => launches.find(({ longest }) => length <= longest) as RowLaunch
}

/** Rows over the last axis, and their length. */
export function rowsOf(shape: Shape): [rows: number, length: number] {
  return [sizeOf(shape.slice(0, -1)), shape[shape.length - 1]]
}
