/** @file Backward pass of attention on Hopper: one kernel for keys and values and one for queries, so that the order of sums is fixed. */
import type { Value } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'
import type { Round } from '../matmul/operands.ts'
import { boxedHeads, heads, sizes } from './heads.ts'

/** Rows per block (BackwardHopper in attention-sm90a.cu). */
const rows = 128
/** Saved per-query values of a sequence are padded to a multiple of this (roomFor). */
const room = 64
const stages = 3
/** Threads per block: two warpgroups. */
const threads = 256

/** Dynamic shared memory: the block's rows, stages of columns, and padding to align to 1024. */
const sharedBytes = (dk: number, dv: number, columns: number) => (rows + stages * columns) * (dk + dv) * 2 + 1024

interface Inputs {
  readonly q: Value
  readonly k: Value
  readonly v: Value
  readonly out: Value
  readonly lse: Value
  readonly dout: Value
  readonly lengths?: Value
  readonly starts?: Value
}

/** Takes the op's outputs and inputs, none of which may be empty. Returns false if the heads are too large. */
export type AttentionBackward = (
  gradients: { readonly dq: number; readonly dk: number; readonly dv: number },
  inputs: Inputs,
  attrs: { readonly causal: boolean; readonly scale: number },
) => boolean

export function attentionBackwardOnHopper(cuda: Cuda, round: Round): AttentionBackward {
  const perQuery = cuda.kernel('attention-sm90a', 'moe_attention_delta_sm90a', 'p p p p p i i i i')
  const kernel = (name: string, parameters: string) => cuda.kernel('attention-sm90a', name, `${parameters} ${sizes}`)
  const kernelsOf = (keyKernels: readonly string[], name: string) => ({
    keys: keyKernels.map(of => kernel(`moe_attention_bwd_${of}_sm90a_${name}`, 'p p t t t t p p p p')),
    queries: kernel(`moe_attention_bwd_queries_sm90a_${name}`, 'p t t t t p p p p'),
  })
  const kernels = heads.map(({ dk, dv, backward, keyKernels }) => ({
    dk,
    dv,
    columns: backward,
    plain: kernelsOf(keyKernels, `${dk}_${dv}`),
    withStarts: kernelsOf(keyKernels, `${dk}_${dv}_starts`),
  }))
  return (gradients, { q, k, v, out, lse, dout, lengths, starts }, { causal, scale }) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const engine = kernels.find(({ dk, dv }) => Dk <= dk && Dv <= dv)
    if (engine === undefined) return false
    const { dk, dv, columns, plain, withStarts } = engine
    const { keys, queries } = starts ? withStarts : plain

    const padded = Math.ceil(T / room) * room
    const [delta, shift] = [1, 2].map(() => cuda.scratch(B * H * padded * 4).pointer)
    const blocks = Math.min(Math.ceil((B * H * padded) / 8), cuda.multiprocessors * 16)
    const saved = [lse, out, dout].map(pointerOf)
    perQuery({ grid: blocks, block: 256 }, delta, shift, ...saved, B, T, H, Dv)

    const boxed = boxedHeads(cuda, round, [
      { of: q, features: dk },
      { of: k, features: dk },
      { of: v, features: dv },
      { of: dout, features: dv },
    ])
    const [queriesAsRows, keysAsRows, valuesAsRows, doutAsRows] = boxed(rows)
    const [queriesAsColumns, keysAsColumns, valuesAsColumns, doutAsColumns] = boxed(columns)
    const rest = [
      shift,
      delta,
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
    ]
    const launch = { block: threads, shared: sharedBytes(dk, dv, columns) }
    for (const ofKeys of keys)
      ofKeys(
        { grid: [Math.ceil(S / rows), G, B], ...launch },
        gradients.dk,
        gradients.dv,
        queriesAsColumns,
        keysAsRows,
        valuesAsRows,
        doutAsColumns,
        ...rest,
      )
    queries(
      { grid: [Math.ceil(T / rows), H, B], ...launch },
      gradients.dq,
      queriesAsRows,
      keysAsColumns,
      valuesAsColumns,
      doutAsRows,
      ...rest,
    )
    return true
  }
}
