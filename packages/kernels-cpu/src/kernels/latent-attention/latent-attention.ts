/** @file Absorbed MLA decoding over the latent cache. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const latentAttention: FusedFactory<'latentAttention'> = native => {
  const kernels = { f32: native.kernel('moe_latent_attention_f32'), bf16: native.kernel('moe_latent_attention_bf16') }
  return ([q, cache, lengths, pages], { scale, valueDim, precision }, [spec]) => {
    const [B, T, H, C] = q.shape
    const out = native.output(spec)
    const page = cache.shape[1]
    const S = pages === undefined ? page : pages.shape[1] * page
    const [to, from, rows, used] = [out.pointer, pointerOf(q), pointerOf(cache), pointerOf(lengths)]
    const table = pages === undefined ? 0 : pointerOf(pages)
    const stored = cache.dtype === 'bf16' ? 1 : 0
    kernels[precision](to, from, rows, used, B, T, S, H, C, valueDim, scale, stored, table, page)
    return [out]
  }
}
