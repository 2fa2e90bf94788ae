/** @file Attention forward on Hopper. */
import type { Value } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'
import { boxColumns } from '../../tensor-map.ts'
import { paddedColumns, type Round, wholeMatrix } from '../matmul/gemm.ts'
import { heads, sizes } from './heads.ts'

/** Rows and columns of a score tile (FlashHopper of attention-sm90a.cu). */
const tile = 128
const stages = 2
/** Two warpgroups. */
const threads = 256

/** Dynamic shared memory: the queries, stages of keys and values, and room to begin at a multiple of 1024. */
const sharedBytes = (dk: number, dv: number) => (tile * dk + stages * tile * (dk + dv)) * 2 + 1024

/** As the op's inputs and outputs, of which none is empty. False when heads are too large. */
export type AttentionForward = (
  out: number,
  lse: number,
  inputs: { readonly q: Value; readonly k: Value; readonly v: Value; readonly lengths?: Value },
  attrs: { readonly causal: boolean; readonly scale: number },
) => boolean

export function attentionOnHopper(cuda: Cuda, round: Round): AttentionForward {
  const transpose = cuda.kernel('attention-sm90a', 'moe_attention_values_sm90a', 'p p p i i i')
  const kernels = heads.map(({ dk, dv }) => ({
    dk,
    dv,
    kernel: cuda.kernel('attention-sm90a', `moe_attention_fwd_sm90a_${dk}_${dv}`, `p p t t t p ${sizes}`),
  }))
  return (out, lse, { q, k, v, lengths }, { causal, scale }) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const engine = kernels.find(({ dk, dv }) => Dk <= dk && Dv <= dv)
    if (engine === undefined) return false
    const { dk, dv, kernel } = engine
    const ends = lengths ? pointerOf(lengths) : 0
    const [queries, keys] = round([wholeMatrix(q, B * T * H, Dk, dk), wholeMatrix(k, B * S * G, Dk, dk)])
    const features = G * Dv
    const ld = paddedColumns(S)
    const values = cuda.scratch(B * features * ld * 2).pointer
    const blocks = B * Math.ceil(features / boxColumns) * Math.ceil(S / boxColumns)
    transpose({ grid: blocks, block: 256 }, values, pointerOf(v), ends, features, S, ld)
    kernel(
      { grid: [Math.ceil(T / tile), H, B], block: threads, shared: sharedBytes(dk, dv) },
      out,
      lse,
      cuda.tensorMap({ pointer: queries.pointer, ld: H * dk, matrices: B, rows: T, columns: H * dk, boxRows: tile }),
      cuda.tensorMap({ pointer: keys.pointer, ld: G * dk, matrices: B, rows: S, columns: G * dk, boxRows: tile }),
      cuda.tensorMap({ pointer: values, ld, matrices: B, rows: features, columns: S, boxRows: dv }),
      ends,
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
