/** @file Rotary position embedding. */
import { mostBlocks } from '../../modules.ts'
import { type FusedFactory, pointerOf } from '../../native.ts'

const block = 256

export const rope: FusedFactory<'rope'> = cuda => {
  const signature = 'p p p p p p i i i i i i i i i i'
  const kernel = cuda.kernel('rope', 'moe_rope_f32', signature)
  const by4 = cuda.kernel('rope', 'moe_rope_f32_by4', signature)
  return ([x, cos, sin, plain], { interleaved, inverse }, [spec]) => {
    const y = cuda.output(spec)
    const [B, T, H, D] = x.shape
    const rank = cos.shape.length
    const half = cos.shape[rank - 1]
    const all = spec.shape[3]
    const first = all - 2 * half
    const isFours = D % 4 === 0 && all % 4 === 0 && half % (interleaved ? 2 : 4) === 0
    const vectors = (H * all) / (isFours ? 4 : 1)
    if (vectors === 0) return [y]
    // A small position shares its block with others; a large one is split over several blocks, usually with up to 4 vectors per thread.
    const grid = [
      Math.ceil((B * T) / Math.max(1, Math.floor(block / vectors))),
      Math.min(Math.ceil(vectors / (4 * block)), mostBlocks[1]),
    ]
    const pointers = [x, cos, sin, plain ?? x].map(pointerOf)
    const sizes = [B * T, T, H, D, first, plain ? first : D, half]
    const flags = [+(rank === 3), +interleaved, +inverse]
    const rounded = isFours ? cuda.roundedBy(y, `${H} ${all}${inverse ? ' back' : ''}`) : 0
    ;(isFours ? by4 : kernel)({ grid, block }, y.pointer, rounded, ...pointers, ...sizes, ...flags)
    return [y]
  }
}
