/** @file Absorbed MLA decoding on Hopper, over a bf16 latent cache. */
import { sizeOf, type Value } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'

/** Rows and keys of a tile (LatentHopper in latent-attention-sm90a.cu), and the supported features of keys and values. */
export const tile = 64
/** Threads per block: two warpgroups. */
const threads = 256
const kernels = [
  { dk: 192, dv: 128, stages: 4 },
  { dk: 320, dv: 256, stages: 4 },
  { dk: 576, dv: 512, stages: 2 },
] as const

/** Dynamic shared memory: the queries, tiles of the cache, exponentials, and padding to align to 1024. */
const sharedBytes = (dk: number, stages: number) => tile * dk * 2 * (1 + stages) + tile * tile * 2 + 1024

interface Inputs {
  readonly q: Value
  readonly cache: Value
  readonly lengths: Value
  readonly pages: Value | undefined
}

/** A tile's rows are copied as one box from a page, or as one box each from several small pages, aligned to the swizzle's pattern (8 rows). */
const fitsTile = (page: number) => page % tile === 0 || (tile % page === 0 && page % 8 === 0)

/** Like the kernels of latent-attention.cu: splits the keys of each sequence into `parts`, each with its own results and log-sum-exps. */
export type LatentDecode = (
  results: number,
  lse: number,
  parts: number,
  inputs: Inputs,
  attrs: { readonly valueDim: number; readonly scale: number },
) => void

/** The kernel for these sizes; undefined if there is none. */
export function latentOnHopper(cuda: Cuda): (inputs: Inputs, valueDim: number) => LatentDecode | undefined {
  const launches = kernels.map(({ dk, dv, stages }) => {
    const kernel = cuda.kernel(
      'latent-attention-sm90a',
      `moe_latent_attention_sm90a_${dk}_${dv}`,
      'p p p t p i i i i i i f p i',
    )
    const launch: LatentDecode = (results, lse, parts, { q, cache, lengths, pages }, { valueDim, scale }) => {
      const [B, T, H, C] = q.shape
      const [matrices, P] = cache.shape
      const S = pages === undefined ? P : pages.shape[1] * P
      const boxRows = pages === undefined ? tile : Math.min(tile, P)
      kernel(
        { grid: [Math.ceil((T * H) / tile) * B, parts], block: threads, shared: sharedBytes(dk, stages) },
        results,
        lse,
        pointerOf(q),
        cuda.tensorMap({ pointer: pointerOf(cache), ld: C, matrices, rows: P, columns: C, boxRows }),
        pointerOf(lengths),
        B,
        T,
        S,
        H,
        C,
        valueDim,
        scale,
        pages === undefined ? 0 : pointerOf(pages),
        P,
      )
    }
    return { dk, dv, launch }
  })
  return ({ q, cache, pages }, valueDim) => {
    const C = q.shape[3]
    // The copy engine needs rows of whole 16-byte chunks, and no empty matrix.
    if (cache.dtype !== 'bf16' || C % 8 !== 0 || sizeOf(cache.shape) === 0) return undefined
    if (pages !== undefined && !fitsTile(cache.shape[1])) return undefined
    return launches.find(({ dk, dv }) => C <= dk && valueDim <= dv)?.launch
  }
}
