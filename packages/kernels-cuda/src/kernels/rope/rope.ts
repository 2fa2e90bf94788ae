/** @file Rotary position embedding. */
import { type FusedFactory, pointerOf } from '../../native.ts'

const block = 256

export const rope: FusedFactory<'rope'> = cuda => {
  const signature = 'p p p p i i i i i i i i'
  const kernel = cuda.kernel('rope', 'moe_rope_f32', signature)
  const by4 = cuda.kernel('rope', 'moe_rope_f32_by4', signature)
  return ([x, cos, sin], { interleaved, inverse }, [spec]) => {
    const y = cuda.output(spec)
    const [B, T, H, D] = x.shape
    const rank = cos.shape.length
    const half = cos.shape[rank - 1]
    const isFours = D % 4 === 0 && half % (interleaved ? 2 : 4) === 0
    const vectors = isFours ? (H * D) / 4 : H * D
    if (vectors === 0) return [y]
    // A small position shares its block with others; a large one is for several blocks of up to 4 vectors a thread.
    const grid = [Math.ceil((B * T) / Math.max(1, Math.floor(block / vectors))), Math.ceil(vectors / (4 * block))]
    const tables = [pointerOf(cos), pointerOf(sin)]
    const flags = [+(rank === 3), +interleaved, +inverse]
    ;(isFours ? by4 : kernel)({ grid, block }, y.pointer, pointerOf(x), ...tables, B * T, T, H, D, half, ...flags)
    return [y]
  }
}
