/** @file Attention that never stores its scores, forward and backward. */
import type { Value, WidePrecision } from '@moe/core'
import { mostBlocks } from '../../modules.ts'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { attentionBackwardOnHopper } from '../attention-sm90a/backward.ts'
import { attentionOnHopper } from '../attention-sm90a/forward.ts'
import { type DenseMatrix, roundToBf16, wholeMatrix } from '../matmul/operands.ts'

/** Threads per block, and rows and columns of its tile of scores. */
interface Tile {
  readonly threads: number
  readonly m: number
  readonly n: number
}

/** A kernel configuration of flash.cuh, for up to this many features of keys and of values. */
interface Engine {
  readonly precision: WidePrecision
  readonly dk: number
  readonly dv: number
  readonly forward: Tile
  readonly backward: Tile
  /** Kernels for the gradients of keys and values: one for both, or one each. */
  readonly keyKernels: readonly string[]
}

const [together, apart] = [['keys'], ['keys', 'values']]
const bf16 = (dk: number, dv: number): Engine => ({
  precision: 'bf16',
  dk,
  dv,
  forward: { threads: 128, m: 128, n: 32 },
  backward: { threads: 128, m: 64, n: 32 },
  keyKernels: together,
})
const widestBf16: Engine = {
  precision: 'bf16',
  dk: 256,
  dv: 256,
  forward: { threads: 256, m: 128, n: 16 },
  backward: { threads: 128, m: 64, n: 16 },
  keyKernels: apart,
}
const f32 = (dk: number, dv: number): Engine => {
  const tile = { threads: 256, m: 32, n: 32 }
  return { precision: 'f32', dk, dv, forward: tile, backward: tile, keyKernels: together }
}
const engines = [bf16(64, 64), bf16(128, 128), bf16(192, 128), widestBf16, f32(64, 64), f32(192, 128), f32(256, 256)]
const nameOf = (e: Engine) => `${e.precision}_${e.dk}_${e.dv}`

/** Bytes of `rows` rows of keys or queries and of values. The f32 kernels pad rows by four features to avoid bank conflicts. */
const rowBytes = (e: Engine, keyRows: number, valueRows: number) =>
  e.precision === 'bf16' ? (keyRows * e.dk + valueRows * e.dv) * 2 : (keyRows * (e.dk + 4) + valueRows * (e.dv + 4)) * 4
const stages = (e: Engine) => (e.precision === 'bf16' ? 2 : 1)
const scratch = (e: Engine, { m, n }: Tile) => (e.precision === 'bf16' ? 0 : m * (n + 1) * 4)
const forwardShared = (e: Engine) =>
  scratch(e, e.forward) + rowBytes(e, e.forward.m, 0) + stages(e) * rowBytes(e, e.forward.n, e.forward.n)
const backwardShared = (e: Engine) => {
  const { m, n } = e.backward
  return scratch(e, e.backward) + rowBytes(e, m, m) + stages(e) * (rowBytes(e, n, n) + 2 * n * 4)
}

/** The smallest configuration for these heads. Heads too large for bf16 are computed in f32. */
function findEngine(cuda: Cuda, precision: WidePrecision, dk: number, dv: number, shared: (e: Engine) => number) {
  const fitting = engines.filter(e => dk <= e.dk && dv <= e.dv && shared(e) <= cuda.sharedMemory)
  return fitting.find(e => e.precision === precision) ?? fitting.find(e => e.precision === 'f32')
}

/** Whether the grids, with sequences along z and heads along y, are possible. Otherwise core computes attention with other ops. */
const fitsGrid = (B: number, H: number) => B <= mostBlocks[2] && H <= mostBlocks[1]

/** The tensors as a configuration reads them: unchanged, or in bf16 with padded features. */
function prepare(
  engine: Engine,
  round: (m: readonly DenseMatrix[]) => Array<{ pointer: number }>,
  keys: readonly Value[],
  values: readonly Value[],
) {
  if (engine.precision === 'f32') return [...keys, ...values].map(pointerOf)
  const matrix = (ld: number) => (x: Value) => {
    const [b, rows, heads, columns] = x.shape
    return wholeMatrix(x, b * rows * heads, columns, ld)
  }
  return round([...keys.map(matrix(engine.dk)), ...values.map(matrix(engine.dv))]).map(m => m.pointer)
}

const sizes = 'i i i i i i i i i i f'

export const attention: FusedFactory<'attention'> = cuda => {
  const round = roundToBf16(cuda)
  const onHopper = cuda.onHopper('attention') ? attentionOnHopper(cuda, round) : undefined
  const kernelsOf = (suffix: string) =>
    new Map(
      engines.map(e => [
        e,
        cuda.kernel('attention', `moe_attention_fwd_${nameOf(e)}${suffix}`, `p p p p p p p ${sizes}`),
      ]),
    )
  const [kernels, kernelsWithStarts] = [kernelsOf(''), kernelsOf('_starts')]
  return ([q, k, v, lengths, starts], { causal, scale, precision }, [outSpec, lseSpec]) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const engine = findEngine(cuda, precision, Dk, Dv, forwardShared)
    if (!engine || !fitsGrid(B, H)) return undefined
    const out = cuda.output(outSpec)
    const lse = cuda.output(lseSpec)
    if (B * T * H === 0) return [out, lse]
    // The Hopper kernels find the largest score before scaling.
    if (onHopper !== undefined && precision === 'bf16' && scale > 0 && S * G * Dk * Dv > 0) {
      if (onHopper(out.pointer, lse.pointer, { q, k, v, lengths, starts }, { causal, scale })) return [out, lse]
    }
    const [ldk, ldv] = engine.precision === 'bf16' ? [engine.dk, engine.dv] : [Dk, Dv]
    const kernel = (starts ? kernelsWithStarts : kernels).get(engine)
    kernel?.(
      {
        grid: [Math.ceil(T / engine.forward.m), H, B],
        block: engine.forward.threads,
        shared: forwardShared(engine),
      },
      out.pointer,
      lse.pointer,
      ...prepare(engine, round, [q, k], [v]),
      lengths ? pointerOf(lengths) : 0,
      starts ? pointerOf(starts) : 0,
      B,
      T,
      S,
      H,
      G,
      Dk,
      Dv,
      ldk,
      ldv,
      +causal,
      scale,
    )
    return [out, lse]
  }
}

export const attentionBackward: FusedFactory<'attentionBackward'> = cuda => {
  const round = roundToBf16(cuda)
  const onHopper = cuda.onHopper('attention') ? attentionBackwardOnHopper(cuda, round) : undefined
  const delta = cuda.kernel('attention', 'moe_attention_delta_f32', 'p p p i i i i')
  const kernel = (name: string, pointers: string) => cuda.kernel('attention', name, `${pointers} ${sizes}`)
  const kernelsOf = (suffix: string) =>
    new Map(
      engines.map(e => [
        e,
        {
          keys: e.keyKernels.map(of => kernel(`moe_attention_bwd_${of}_${nameOf(e)}${suffix}`, 'p p p p p p p p p p')),
          queries: kernel(`moe_attention_bwd_queries_${nameOf(e)}${suffix}`, 'p p p p p p p p p'),
        },
      ]),
    )
  const [kernels, kernelsWithStarts] = [kernelsOf(''), kernelsOf('_starts')]
  return ([q, k, v, out, lse, dout, lengths, starts], { causal, scale, precision }, [dqSpec, dkSpec, dvSpec]) => {
    const [B, T, H, Dk] = q.shape
    const [, S, G, Dv] = v.shape
    const engine = findEngine(cuda, precision, Dk, Dv, backwardShared)
    if (!engine || !fitsGrid(B, H)) return undefined
    const dq = cuda.output(dqSpec)
    const dk = cuda.output(dkSpec)
    const dv = cuda.output(dvSpec)
    if (B * H === 0) return [dq, dk, dv]
    if (onHopper !== undefined && precision === 'bf16' && T * S * G * Dk * Dv > 0) {
      const gradients = { dq: dq.pointer, dk: dk.pointer, dv: dv.pointer }
      if (onHopper(gradients, { q, k, v, out, lse, dout, lengths, starts }, { causal, scale })) return [dq, dk, dv]
    }
    const deltas = cuda.scratch(B * H * T * 4).pointer
    const rows = Math.ceil((B * T * H) / 8)
    delta(
      { grid: Math.min(rows, cuda.multiprocessors * 16), block: 256 },
      deltas,
      pointerOf(out),
      pointerOf(dout),
      B,
      T,
      H,
      Dv,
    )
    const [ldk, ldv] = engine.precision === 'bf16' ? [engine.dk, engine.dv] : [Dk, Dv]
    const inputs = [
      ...prepare(engine, round, [q, k], [v, dout]),
      pointerOf(lse),
      deltas,
      lengths ? pointerOf(lengths) : 0,
      starts ? pointerOf(starts) : 0,
      B,
      T,
      S,
      H,
      G,
      Dk,
      Dv,
      ldk,
      ldv,
      +causal,
      scale,
    ]
    const { m, threads } = engine.backward
    const launch = { block: threads, shared: backwardShared(engine) }
    const found = (starts ? kernelsWithStarts : kernels).get(engine)
    const { keys, queries } = found as NonNullable<typeof found>
    for (const gradients of keys)
      gradients({ grid: [Math.ceil(S / m), G, B], ...launch }, dk.pointer, dv.pointer, ...inputs)
    queries({ grid: [Math.ceil(T / m), H, B], ...launch }, dq.pointer, ...inputs)
    return [dq, dk, dv]
  }
}
