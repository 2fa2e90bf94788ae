/** @file The norm over all gradients. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

/** Tensors per kernel call; the kernel accumulates the sum over the calls. */
const batch = 28

export const globalNorm: FusedFactory<'globalNorm'> = native => {
  const kernel = native.kernel('moe_global_norm_f32')
  return (tensors, _attrs, [spec]) => {
    const norm = native.output(spec)
    let at = 0
    do {
      const some = tensors.slice(at, at + batch)
      const isLast = at + batch >= tensors.length
      const list = some.flatMap(value => [pointerOf(value), sizeOf(value.shape)])
      kernel(norm.pointer, sizeOf(spec.shape), +(at === 0), +isLast, some.length, ...list)
      at += batch
    } while (at < tensors.length)
    return [norm]
  }
}
