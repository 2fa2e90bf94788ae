/** @file Absorbed MLA decoding over the latent cache. */
import type { WidePrecision } from '@moe/core'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { latentOnHopper, tile as tileOnHopper } from '../latent-attention-sm90a/decode.ts'
import { choice } from '../matmul/tiles.ts'

/** Maximum number of features of the kernels' tiles: of the cache, and of values. */
const mostC = 576
const mostV = 512
const mostParts = 128

interface Variant {
  readonly name: string
  readonly precision: WidePrecision
  readonly cache: 'f32' | 'bf16'
  /** Rows and keys of a tile. */
  readonly m: number
  readonly n: number
  readonly threads: number
  readonly shared: number
}

const caches = ['f32', 'bf16'] as const

// Queries, keys (f32 keys both in bf16 and as they arrive; bf16 keys in two buffers), exponentials, and two numbers per row.
const bf16 = (m: number, n: number): Variant[] =>
  caches.map(cache => ({
    name: `bf16_${m}x${n}_${cache}`,
    precision: 'bf16',
    cache,
    m,
    n,
    threads: m * 4,
    shared: m * mostC * 2 + n * mostC * (cache === 'f32' ? 6 : 4) + m * 32 * 2 + m * 2 * 4,
  }))
const f32: Variant[] = caches.map(cache => ({
  name: `f32_16x16_${cache}`,
  precision: 'f32',
  cache,
  m: 16,
  n: 16,
  threads: 256,
  shared: (2 * 16 * (mostC + 4) + 16 * 17) * 4,
}))
/** In order of preference. */
const variants = [...bf16(64, 32), ...bf16(32, 16), ...f32]

/** Fixed cost of a block, in tiles of keys of about 72 KiB: reading its queries, and writing and rereading its results. */
const tilesPerBlock = 6

/**
 * The number of parts into which to split the keys. Each part is a block per tile of rows and has at least four tiles of keys. Chooses the number with which the
 * multiprocessors, each running one block at a time, finish first.
 */
function partsOf(cuda: Cuda, blocks: number, tiles: number): number {
  const time = (parts: number) =>
    Math.ceil((blocks * parts) / cuda.multiprocessors) * (Math.ceil(tiles / parts) + tilesPerBlock)
  let best = 1
  for (let parts = 2; parts <= Math.min(tiles / 4, mostParts); parts++) if (time(parts) < time(best)) best = parts
  choice.taken.parts = choice.parts ?? best
  return choice.taken.parts
}

export const latentAttention: FusedFactory<'latentAttention'> = cuda => {
  const kernels = new Map(
    variants.map(v => [
      v,
      cuda.kernel('latent-attention', `moe_latent_attention_${v.name}`, 'p p p p p i i i i i i f p i'),
    ]),
  )
  const onHopper = cuda.onHopper('latent-attention') ? latentOnHopper(cuda) : undefined
  const combine = cuda.kernel('latent-attention', 'moe_latent_attention_combine_f32', 'p p p i l i')
  return ([q, cache, lengths, pages], { scale, valueDim, precision }, [spec]) => {
    const [B, T, H, C] = q.shape
    const P = cache.shape[1]
    const S = pages === undefined ? P : pages.shape[1] * P
    // The bf16 kernels copy the cache in 16-byte chunks.
    const usable = C % (cache.dtype === 'bf16' ? 8 : 4) === 0 ? precision : 'f32'
    const variant = variants.find(
      v => v.precision === usable && v.cache === cache.dtype && v.shared <= cuda.sharedMemory,
    )
    if (!variant || C > mostC || valueDim > mostV) return undefined
    const out = cuda.output(spec)
    const rows = B * T * H
    if (rows * valueDim === 0) return [out]
    const inputs = { q, cache, lengths, pages }
    // The Hopper kernels find the largest score before scaling.
    const launch = precision === 'bf16' && scale > 0 ? onHopper?.(inputs, valueDim) : undefined
    const { m, n } = launch === undefined ? variant : { m: tileOnHopper, n: tileOnHopper }
    const tiles = Math.ceil((T * H) / m)
    const parts = partsOf(cuda, B * tiles, Math.ceil(S / n))
    const results = parts === 1 ? out.pointer : cuda.scratch(parts * rows * valueDim * 4).pointer
    const lse = parts === 1 ? 0 : cuda.scratch(parts * rows * 4).pointer
    if (launch !== undefined) launch(results, lse, parts, inputs, { valueDim, scale })
    else
      kernels.get(variant)?.(
        { grid: [tiles * B, parts], block: variant.threads, shared: variant.shared },
        results,
        lse,
        pointerOf(q),
        pointerOf(cache),
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
    if (parts > 1)
      combine({ grid: Math.min(rows, 65535), block: 128 }, out.pointer, results, lse, parts, rows, valueDim)
    return [out]
  }
}
