/** @file Forward pass of attention on Hopper. */
import type { Value } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'
import type { Round } from '../matmul/operands.ts'
import { boxedHeads, heads, sizes } from './heads.ts'

/** Queries per block (FlashHopper in attention-sm90a.cu). */
const rows = 128
const stages = 2
/** Threads per block: two warpgroups. */
const threads = 256

/** Dynamic shared memory: the queries, stages of keys and values, and padding to align to 1024. */
const sharedBytes = (dk: number, dv: number, keys: number) => (rows * dk + stages * keys * (dk + dv)) * 2 + 1024

/** For benchmarks: whether the two warpgroups alternate products, so that one's exponentials overlap with the other's products. */
export const schedule = { pingpong: false }

/** Takes the op's inputs and outputs, none of which may be empty. Returns false if the heads are too large. */
export type AttentionForward = (
  out: number,
  lse: number,
  inputs: {
    readonly q: Value
    readonly k: Value
    readonly v: Value
    readonly lengths?: Value
    readonly starts?: Value
  },
  attrs: { readonly causal: boolean; readonly scale: number },
) => boolean

export function attentionOnHopper(cuda: Cuda, round: Round): AttentionForward {
  const kernel = (name: string) => cuda.kernel('attention-sm90a', name, `p p t t t p p ${sizes}`)
  const kernels = heads.map(({ dk, dv, forward }) => ({
    dk,
    dv,
    keys: forward,
    plain: kernel(`moe_attention_fwd_sm90a_${dk}_${dv}`),
    withStarts: kernel(`moe_attention_fwd_sm90a_${dk}_${dv}_starts`),
    pingpong: kernel(`moe_attention_fwd_sm90a_${dk}_${dv}_pingpong`),
  }))
  return (out, lse, { q, k, v, lengths, starts }, { causal, scale }) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const engine = kernels.find(({ dk, dv }) => Dk <= dk && Dv <= dv)
    if (engine === undefined) return false
    const { dk, dv, keys, plain, withStarts, pingpong } = engine
    const boxed = boxedHeads(cuda, round, [
      { of: q, features: dk },
      { of: k, features: dk },
      { of: v, features: dv },
    ])
    const [queries] = boxed(rows)
    const [, ...keysAndValues] = boxed(keys)
    const launch = starts ? withStarts : schedule.pingpong ? pingpong : plain
    launch(
      { grid: [Math.ceil(T / rows), H, B], block: threads, shared: sharedBytes(dk, dv, keys) },
      out,
      lse,
      queries,
      ...keysAndValues,
      lengths ? pointerOf(lengths) : 0,
      starts ? pointerOf(starts) : 0,
      T,
      S,
      H,
      G,
      Dk,
      Dv,
      +causal,
      scale,
    )
    return true
  }
}
