/** @file Kernels that assign rows to a warp or to a block, depending on the rows' length. */
import type { Shape } from '@moe/core'
import { sizeOf } from '@moe/core'
import type { Cuda } from '../../native.ts'

/** Threads that share a row. A warp holds rows of up to 1024 elements in registers; 256 threads hold 8192 and reread the rest. */
const variants = [
  { threads: 32, longest: 1024 },
  { threads: 256, longest: Number.POSITIVE_INFINITY },
]

/** Minimum block size: if a row takes fewer threads, a block processes several rows. */
const leastBlock = 128

export interface RowLaunch {
  /** Rows that a block processes at a time. */
  readonly rowsPerBlock: number
  readonly block: number
  readonly kernel: ReturnType<Cuda['kernel']>
}

/** The variant `<name>_t32` or `<name>_t256` for rows of this length. */
export function rowKernel(cuda: Cuda, module: string, name: string, signature: string): (length: number) => RowLaunch {
  const launches = variants.map(({ threads, longest }) => {
    const block = Math.max(threads, leastBlock)
    const kernel = cuda.kernel(module, `${name}_t${threads}`, signature)
    return { longest, block, rowsPerBlock: block / threads, kernel }
  })
  return length => launches.find(({ longest }) => length <= longest) as RowLaunch
}

/** Number of rows over the last axis, and their length. */
export function rowsOf(shape: Shape): [rows: number, length: number] {
  return [sizeOf(shape.slice(0, -1)), shape[shape.length - 1]]
}
