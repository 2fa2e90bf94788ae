/** @file Rotary position embedding. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const rope: FusedFactory<'rope'> = native => {
  const kernel = native.kernel('moe_rope_f32')
  return ([x, cos, sin, plain], { interleaved, inverse }, [spec]) => {
    const y = native.output(spec)
    const [B, T, H, D] = x.shape
    const rank = cos.shape.length
    const half = cos.shape[rank - 1]
    const first = spec.shape[3] - 2 * half
    const pointers = [x, cos, sin, plain ?? x].map(pointerOf)
    const sizes = [B, T, H, D, first, plain ? first : D, half]
    kernel(y.pointer, ...pointers, ...sizes, +(rank === 3), +interleaved, +inverse)
    return [y]
  }
}
