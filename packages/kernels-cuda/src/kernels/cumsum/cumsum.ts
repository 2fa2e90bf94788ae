/** @file Cumulative sums along one axis. */
import { sizeOf } from '@moe/core'
import { type Cuda, type PrimitiveFactory, pointerOf } from '../../native.ts'

const kernelsOf = (cuda: Cuda, dtype: string) => ({
  rows: cuda.kernel('cumsum', `moe_cumsum_${dtype}_rows`, 'p p l'),
  columns: cuda.kernel('cumsum', `moe_cumsum_${dtype}_columns`, 'p p l l l i'),
})

export const cumsum: PrimitiveFactory<'cumsum'> = cuda => {
  const kernels = { f32: kernelsOf(cuda, 'f32'), i32: kernelsOf(cuda, 'i32') }
  return ([x], { axis }, [spec]) => {
    const y = cuda.output(spec)
    const { rows, columns } = kernels[spec.dtype as 'f32' | 'i32']
    const count = x.shape[axis]
    const outer = sizeOf(x.shape.slice(0, axis))
    const inner = sizeOf(x.shape.slice(axis + 1))
    if (inner === 1) {
      rows({ grid: outer, block: count <= 512 ? 32 : 256 }, y.pointer, pointerOf(x), count)
    } else {
      // With few or short columns, several threads share one.
      const width = outer * inner >= 65536 || count < 64 ? 256 : 32
      const grid = Math.ceil((outer * inner) / width)
      columns({ grid, block: 256 }, y.pointer, pointerOf(x), outer, count, inner, width)
    }
    return [y]
  }
}
