/** @file Block-wise 8-bit quantization. */
import { sizeOf } from '@moe/core'
import { type FusedFactory, pointerOf } from '../../native.ts'

/** Largest quantization block that a warp handles; larger ones take a thread block. */
const warpBlock = 1024

export const quantize: FusedFactory<'quantize'> = cuda => {
  const signature = 'p p p l i i i i i'
  const byWarp = cuda.kernel('quantize', 'moe_quantize_f32_t32', signature)
  const byBlock = cuda.kernel('quantize', 'moe_quantize_f32_t512', signature)
  return ([x], { block: [br, bc] }, [qSpec, scaleSpec]) => {
    const q = cuda.output(qSpec)
    const scale = cuda.output(scaleSpec)
    const [R, C] = x.shape
    const blocks = sizeOf(scaleSpec.shape)
    const isSmall = Math.min(br, R) * Math.min(bc, C) <= warpBlock
    const launch = isSmall ? { grid: Math.ceil(blocks / 4), block: 128 } : { grid: blocks, block: 512 }
    const kernel = isSmall ? byWarp : byBlock
    kernel(launch, q.pointer, scale.pointer, pointerOf(x), blocks, scaleSpec.shape[1], R, C, br, bc)
    return [q, scale]
  }
}
