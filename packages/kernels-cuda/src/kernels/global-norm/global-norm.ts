/** @file The norm over all gradients. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

/** Tensors per launch, as in the kernel. */
const batch = 64
/** Elements that a block processes at a time, as in the kernel. */
const chunk = 16_384

export const globalNorm: FusedFactory<'globalNorm'> = cuda => {
  const squares = cuda.kernel('global-norm', 'moe_global_norm_squares_f32', 'p p[64] l[64] i')
  const root = cuda.kernel('global-norm', 'moe_global_norm_root_f32', 'p i p i')
  return (tensors, _attrs, [spec]) => {
    const norm = cuda.output(spec)
    const most = cuda.multiprocessors * 4
    const partial = cuda.scratch(Math.ceil(tensors.length / batch) * most * 8)
    let blocks = 0
    for (let at = 0; at < tensors.length; at += batch) {
      const some = tensors.slice(at, at + batch)
      const sizes = some.map(value => sizeOf(value.shape))
      const grid = Math.min(
        sizes.reduce((chunks, n) => chunks + Math.ceil(n / chunk), 0),
        most,
      )
      squares({ grid, block: 256 }, partial.pointer + blocks * 8, some.map(pointerOf), sizes, some.length)
      blocks += grid
    }
    root({ grid: 1, block: 256 }, norm.pointer, sizeOf(spec.shape), partial.pointer, blocks)
    return [norm]
  }
}
