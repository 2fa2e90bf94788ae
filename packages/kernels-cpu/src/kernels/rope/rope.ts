/** @file Rotary position embedding. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const rope: FusedFactory<'rope'> = native => {
  const kernel = native.kernel('moe_rope_f32')
  return ([x, cos, sin], { interleaved, inverse }, [spec]) => {
    const y = native.output(spec)
    const [B, T, H, D] = x.shape
    const rank = cos.shape.length
    const [px, pc, ps] = [pointerOf(x), pointerOf(cos), pointerOf(sin)]
    kernel(y.pointer, px, pc, ps, B, T, H, D, cos.shape[rank - 1], +(rank === 3), +interleaved, +inverse)
    return [y]
  }
}
