/** @file How a matrix product is divided among blocks: the tile of each, and parts of k. */
import type { WidePrecision } from '@moe/core'
import type { Cuda } from '../../native.ts'

/** A kernel variant of gemm.cuh: its tile of c, block size and dynamic shared memory, and its speed relative to the largest. */
export interface Tile {
  readonly name: string
  readonly m: number
  readonly n: number
  readonly threads: number
  readonly shared: number
  readonly speed: number
}

const tileF32 = (size: number, speed: number): Tile => ({
  name: `f32_${size}x${size}`,
  m: size,
  n: size,
  threads: 256,
  shared: 3 * 16 * (2 * size + 8) * 4,
  speed,
})
const tileBf16 = (m: number, n: number, threads: number, speed: number): Tile => ({
  name: `bf16_${m}x${n}`,
  m,
  n,
  threads,
  shared: 4 * (m + n) * 32 * 2,
  speed,
})

export const tiles: { readonly [P in WidePrecision]: readonly Tile[] } = {
  f32: [tileF32(128, 1), tileF32(64, 0.7)],
  bf16: [tileBf16(128, 256, 256, 1), tileBf16(128, 128, 128, 0.9), tileBf16(64, 64, 128, 0.5)],
}

/** Estimated time of this many blocks, per step of k. Multiprocessors process blocks in waves. */
export const timeOf = (cuda: Pick<Cuda, 'multiprocessors'>, tile: Tile, blocks: number) =>
  (Math.ceil(blocks / cuda.multiprocessors) * tile.m * tile.n) / tile.speed

/** For benchmarks: overrides the choice of tile and parts, and records the latest choice. */
export const choice: { tile?: string; parts?: number; readonly taken: { tile?: string; parts?: number } } = {
  taken: {},
}

/** The variant with the least estimated time, given its number of blocks. */
export function chooseTile(cuda: Cuda, among: readonly Tile[], blocks: (tile: Tile) => number): Tile {
  const time = (tile: Tile) => timeOf(cuda, tile, blocks(tile))
  const tile =
    among.find(({ name }) => name === choice.tile) ??
    among.reduce((best, tile) => (time(tile) < time(best) ? tile : best))
  choice.taken.tile = tile.name
  return tile
}

export const countTiles = (tile: Tile, m: number, n: number) => Math.ceil(m / tile.m) * Math.ceil(n / tile.n)

/** Minimum length of k per part; splitting further does not pay. */
const leastPart = 512
const mostParts = 16

/** The number of parts into which k is split if there are few tiles and k is long. `sumOfParts` then adds their results in order. */
export function partsOfK(cuda: Cuda, blocks: number, k: number): number {
  const most = Math.min(Math.floor(cuda.multiprocessors / blocks), Math.floor(k / leastPart), mostParts)
  choice.taken.parts = choice.parts ?? Math.max(1, most)
  return choice.taken.parts
}
