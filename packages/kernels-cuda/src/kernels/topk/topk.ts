/** @file The k largest elements of each row. */
import { sizeOf } from '@moe/core'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'

/** Elements that a block sorts: 32 KiB of keys. */
const most = 4096

export const topk: PrimitiveFactory<'topk'> = cuda => {
  const sort = cuda.kernel('topk', 'moe_topk_sort', 'p p p p i i i i')
  const merge = cuda.kernel('topk', 'moe_topk_merge', 'p p p p p l i i i i')
  return ([x], { k }, [valuesSpec, indicesSpec]) => {
    const values = cuda.output(valuesSpec)
    const indices = cuda.output(indicesSpec)
    const n = x.shape[x.shape.length - 1]
    const rows = sizeOf(valuesSpec.shape) / k
    const size = Math.min(most, 2 ** Math.ceil(Math.log2(n)))
    let count = Math.ceil(n / size)
    let length = Math.min(k, size)
    // Sorted runs of keys until the last launch, which stores the results.
    const runsOf = (runs: number, keys: number) => (runs === 1 ? 0 : cuda.scratch(rows * runs * keys * 8).pointer)
    let runs = runsOf(count, length)
    const launch = { grid: rows * count, block: Math.min(512, Math.max(32, size / 2)), shared: size * 8 }
    sort(launch, values.pointer, indices.pointer, runs, pointerOf(x), n, size, count, length)
    while (count > 1) {
      const pairs = Math.ceil(count / 2)
      const keep = Math.min(k, 2 * length)
      const merged = runsOf(pairs, keep)
      const grid = elementwiseGrid(cuda, rows * count * length)
      merge(
        { grid, block: 256 },
        values.pointer,
        indices.pointer,
        merged,
        runs,
        pointerOf(x),
        rows,
        n,
        count,
        length,
        keep,
      )
      runs = merged
      count = pairs
      length = keep
    }
    return [values, indices]
  }
}
