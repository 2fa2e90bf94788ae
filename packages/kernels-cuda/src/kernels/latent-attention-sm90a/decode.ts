/** @file Absorbed MLA decode on Hopper, over a latent cache in bf16. */
import { sizeOf, type Value } from '@moe/core'
import { type Cuda, pointerOf } from '../../native.ts'

/** Rows and keys of a tile (LatentHopper of latent-attention-sm90a.cu), and the features of keys and values that there are kernels for. */
export const tile = 64
/** Two warpgroups. */
const threads = 256
const kernels = [
  { dk: 192, dv: 128, stages: 4 },
  { dk: 320, dv: 256, stages: 4 },
  { dk: 576, dv: 512, stages: 2 },
] as const

/** Dynamic shared memory: the queries, tiles of the cache, exponentials, and room to begin at a multiple of 1024. */
const sharedBytes = (dk: number, stages: number) => tile * dk * 2 * (1 + stages) + tile * tile * 2 + 1024

interface Inputs {
  readonly q: Value
  readonly cache: Value
  readonly lengths: Value
  readonly pages: Value | undefined
}

/** The rows of a tile come as one box from a page, or as one from each of several small pages, which begins where the pattern of a swizzle does (8 rows). */
const fitsTile = (page: number) => page % tile === 0 || (tile % page === 0 && page % 8 === 0)

/** As latent-attention.cu's kernels: the keys of each sequence in `parts`, each with results and log sum exp of its own. */
export type LatentDecode = (
  results: number,
  lse: number,
  parts: number,
  inputs: Inputs,
  attrs: { readonly valueDim: number; readonly scale: number },
) => void

/** The kernel for these sizes, if there is one. */
export function latentOnHopper(cuda: Cuda): (inputs: Inputs, valueDim: number) => LatentDecode | undefined {
  const launches = kernels.map(({ dk, dv, stages }) => {
    const kernel = cuda.kernel(
      'latent-attention-sm90a',
      `moe_latent_attention_sm90a_${dk}_${dv}`,
      'p p p t p i i i i i f p i',
    )
    const launch: LatentDecode = (results, lse, parts, { q, cache, lengths, pages }, { valueDim, scale }) => {
      const [B, T, H, C] = q.shape
      const [matrices, P] = cache.shape
      const S = pages === undefined ? P : pages.shape[1] * P
      const boxRows = pages === undefined ? tile : Math.min(tile, P)
      kernel(
        { grid: [parts, Math.ceil((T * H) / tile), B], block: threads, shared: sharedBytes(dk, stages) },
        results,
        lse,
        pointerOf(q),
        cuda.tensorMap({ pointer: pointerOf(cache), ld: C, matrices, rows: P, columns: C, boxRows }),
        pointerOf(lengths),
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
    // The copy engine takes rows of whole chunks of 16 bytes, and no empty matrix.
    if (cache.dtype !== 'bf16' || C % 8 !== 0 || sizeOf(cache.shape) === 0) return undefined
    if (pages !== undefined && !fitsTile(cache.shape[1])) return undefined
    return launches.find(({ dk, dv }) => C <= dk && valueDim <= dv)?.launch
  }
}
