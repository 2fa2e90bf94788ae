/** @file Absorbed MLA decode over the latent cache. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const latentAttention: FusedFactory<'latentAttention'> = native => {
  const kernels = { f32: native.kernel('moe_latent_attention_f32'), bf16: native.kernel('moe_latent_attention_bf16') }
  return ([q, cache, lengths, pages], { scale, valueDim, precision }, [spec]) => {
    if (pages !== undefined) return undefined
    const [B, T, H, C] = q.shape
    const out = native.output(spec)
    const S = cache.shape[1]
    const [to, from, rows, used] = [out.pointer, pointerOf(q), pointerOf(cache), pointerOf(lengths)]
    const stored = cache.dtype === 'bf16' ? 1 : 0
    kernels[precision](to, from, rows, used, B, T, S, H, C, valueDim, scale, stored)
    return [out]
  }
}
