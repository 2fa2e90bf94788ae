/** @file Attention over [batch, time, heads, features], forward and backward. */
import { type FusedFactory, pointerOf } from '../../native.ts'

export const attention: FusedFactory<'attention'> = native => {
  const kernels = { f32: native.kernel('moe_attention_fwd_f32'), bf16: native.kernel('moe_attention_fwd_bf16') }
  return ([q, k, v, lengths, starts], { causal, scale, precision }, [outSpec, lseSpec]) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const out = native.output(outSpec)
    const lse = native.output(lseSpec)
    kernels[precision](
      out.pointer,
      lse.pointer,
      pointerOf(q),
      pointerOf(k),
      pointerOf(v),
      lengths ? pointerOf(lengths) : 0,
      starts ? pointerOf(starts) : 0,
      B,
      T,
      S,
      H,
      G,
      Dk,
      Dv,
      +causal,
      scale,
    )
    return [out, lse]
  }
}

export const attentionBackward: FusedFactory<'attentionBackward'> = native => {
  const kernels = { f32: native.kernel('moe_attention_bwd_f32'), bf16: native.kernel('moe_attention_bwd_bf16') }
  return ([q, k, v, out, lse, dout, lengths, starts], { causal, scale, precision }, [dqSpec, dkSpec, dvSpec]) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const dq = native.output(dqSpec)
    const dk = native.output(dkSpec)
    const dv = native.output(dvSpec)
    kernels[precision](
      dq.pointer,
      dk.pointer,
      dv.pointer,
      pointerOf(q),
      pointerOf(k),
      pointerOf(v),
      pointerOf(out),
      pointerOf(lse),
      pointerOf(dout),
      lengths ? pointerOf(lengths) : 0,
      starts ? pointerOf(starts) : 0,
      B,
      T,
      S,
      H,
      G,
      Dk,
      Dv,
      +causal,
      scale,
    )
    return [dq, dk, dv]
  }
}
