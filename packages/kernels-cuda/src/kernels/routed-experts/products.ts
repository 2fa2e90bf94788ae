/** @file Products of the routed experts with bf16 results: of rows in expert order with `mma`, and of packed rows on Hopper. */

import type { Matrix } from '../../matrix.ts'
import type { Cuda } from '../../native.ts'
import { weightGradient } from '../grouped-matmul/grouped-matmul.ts'
import { hopperPackedWeightGradient, packedRows, type Sizes } from '../grouped-matmul-sm90a/product.ts'
import { chooseTile, type Tile, tiles } from '../matmul/tiles.ts'
import { hopperTiles, operandMap } from '../matmul-sm90a/product.ts'

/** An operand of rows, and the weights of all experts. */
export type Pair = readonly [x: Matrix, weight: Matrix]

/** The layout of rows that are summed over. */
export interface Layout {
  /** Number of rows in memory, including padding rows. */
  readonly rows: number
  /** Addresses of the slot of each row, and of the row of each slot. */
  readonly slots: number
  readonly places: number
}

/** SwiGLU of the results of gate and up. */
export interface Gated {
  /** `[rows, I]`. */
  readonly inner: Matrix
  /** Addresses for the results of gate and up, I elements per row; null if they are not needed. */
  readonly saved: readonly [gate: number, up: number] | null
  /** `[rows, D]`. */
  readonly x: Matrix
  /** Weights `[E, I, D]`. */
  readonly gate: Matrix
  readonly up: Matrix
}

export interface ExpertProducts {
  /** silu(gate x) * (up x) with the weights of each row's expert, in expert order. */
  gated(rows: Gated, offsets: number, sizes: Sizes): void
  /** y `[rows, n]` = x `[rows, k]` times the weight `[experts, n, k]` of each row's expert, in expert order. */
  forward(y: Matrix, pair: Pair, offsets: number, sizes: Sizes): void
  /** Determines the layout for later calls, and writes zeros to dweights (null: 0) for slots without an expert. */
  layout(
    order: number,
    positions: number,
    offsets: number,
    dweights: number,
    sizes: { rows: number; experts: number },
  ): Layout
  /** y `[rows, n]` = the sum of up to two x `[rows, k]` times the weight `[experts, k, n]` of each row's expert, in the layout. */
  backward(y: Matrix, pairs: readonly Pair[], offsets: number, sizes: Sizes): void
  /** dweight `[experts, n, k]` = dy^T x over the rows of each expert, in the layout, where padding rows are zero. */
  weightGradient(dweight: number, dy: Matrix, x: Matrix, offsets: number, sizes: Sizes): void
}

/** Maximum number of row tiles: every expert may start one, and so may the rows after the last one. None of the sizes is zero. */
const countJobs = (tile: Tile, { rows, n, experts }: Sizes) =>
  Math.min(rows, Math.ceil(rows / tile.m) + experts) * Math.ceil(n / tile.n)

/** Half of a tile's columns belong to gate, half to up. */
const gatedOf = (among: readonly Tile[]): readonly Tile[] =>
  among.map(tile => ({ ...tile, name: `${tile.m}x${tile.n / 2}`, n: tile.n / 2 }))

export function expertProducts(cuda: Cuda): ExpertProducts {
  const load = (name: string, signature: string) =>
    cuda.kernel('routed-experts', `moe_routed_experts_${name}`, signature)
  const product = (tile: Tile, form: string, signature: string) => load(`product_${tile.name}_${form}`, signature)
  const among = tiles.bf16
  const kernels = new Map(
    among.map(tile => [
      tile,
      { t: product(tile, 't', 'p p p p i i i i i i i'), n: product(tile, 'n', 'p p p p p i p i i i i i i i') },
    ]),
  )
  const gatedTiles = gatedOf(among)
  const gatedKernels = new Map(
    gatedTiles.map(tile => [tile, load(`gated_bf16_${tile.name}`, 'p p p p p p p i i i i i i i')]),
  )
  const gradient = weightGradient(cuda)
  const launchOf = (sizes: Sizes) => {
    const tile = chooseTile(cuda, among, t => countJobs(t, sizes))
    return {
      kernel: kernels.get(tile),
      launch: { grid: countJobs(tile, sizes), block: tile.threads, shared: tile.shared },
    }
  }
  const numbers = ({ rows, n, k, experts }: Sizes, y: Matrix, [x, weight]: Pair) => [
    rows,
    n,
    k,
    experts,
    y.ld,
    x.ld,
    weight.ld,
  ]
  return {
    gated({ inner, saved, x, gate, up }, offsets, sizes) {
      const tile = chooseTile(cuda, gatedTiles, t => countJobs(t, sizes))
      const launch = { grid: countJobs(tile, sizes), block: tile.threads, shared: tile.shared }
      const [gateRows, upRows] = saved ?? [0, 0]
      const results = [inner.pointer, gateRows, upRows]
      const operands = [x.pointer, gate.pointer, up.pointer]
      gatedKernels.get(tile)?.(launch, ...results, ...operands, offsets, ...numbers(sizes, inner, [x, gate]))
    },
    forward(y, pair, offsets, sizes) {
      const { kernel, launch } = launchOf(sizes)
      const [x, weight] = pair
      kernel?.t(launch, y.pointer, x.pointer, weight.pointer, offsets, ...numbers(sizes, y, pair))
    },
    layout: (order, positions, _offsets, _dweights, { rows }) => ({ rows, slots: order, places: positions }),
    backward(y, pairs, offsets, sizes) {
      const { kernel, launch } = launchOf(sizes)
      const [first, second = first] = pairs.map(pair => pair.map(({ pointer }) => pointer))
      kernel?.n(launch, y.pointer, ...first, ...second, pairs.length, offsets, ...numbers(sizes, y, pairs[0]))
    },
    weightGradient: (dweight, dy, x, offsets, sizes) => gradient('bf16', dweight, dy, x, offsets, sizes),
  }
}

export function hopperExpertProducts(cuda: Cuda): ExpertProducts {
  const gatedTiles = gatedOf(hopperTiles)
  const load = (name: string, signature: string) =>
    cuda.kernel('routed-experts-sm90a', `moe_routed_experts_${name}`, signature)
  const product = (tile: Tile, form: string, signature: string) => load(`product_sm90a_${tile.name}_${form}`, signature)
  const kernels = new Map(
    hopperTiles.map(tile => [
      tile,
      { t: product(tile, 't', 'p t t p i i i i i'), n: product(tile, 'n', 'p t t t t i p i i i i i') },
    ]),
  )
  const gatedKernels = new Map(
    gatedTiles.map(tile => [tile, load(`gated_sm90a_${tile.name}`, 'p p p t t t p i i i i i')]),
  )
  const places = load('places_sm90a', 'p p p p p l i i')
  const weightGradient = hopperPackedWeightGradient(cuda)
  const launchOf = (sizes: Sizes) => {
    const tile = chooseTile(cuda, hopperTiles, t => countJobs(t, sizes))
    const grid = Math.min(countJobs(tile, sizes), cuda.multiprocessors)
    return { tile, kernel: kernels.get(tile), launch: { grid, block: tile.threads, shared: tile.shared } }
  }
  const rowsOf = (x: Matrix, outer: number, tile: Tile, k: number) =>
    operandMap(cuda, x, { matrices: 1, outer, tile: tile.m, k, across: false })
  return {
    gated({ inner, saved, x, gate, up }, offsets, sizes) {
      const { rows, n, k, experts } = sizes
      const tile = chooseTile(cuda, gatedTiles, t => countJobs(t, sizes))
      const grid = Math.min(countJobs(tile, sizes), cuda.multiprocessors)
      const operands = [
        rowsOf(x, rows, tile, k),
        ...[gate, up].map(weight =>
          operandMap(cuda, weight, { matrices: experts, outer: n, tile: tile.n, k, across: false }),
        ),
      ]
      const launch = { grid, block: tile.threads, shared: tile.shared }
      const [gateRows, upRows] = saved ?? [0, 0]
      gatedKernels.get(tile)?.(
        launch,
        inner.pointer,
        gateRows,
        upRows,
        ...operands,
        offsets,
        rows,
        n,
        k,
        experts,
        inner.ld,
      )
    },
    forward(y, [x, weight], offsets, sizes) {
      const { rows, n, k, experts } = sizes
      const { tile, kernel, launch } = launchOf(sizes)
      const left = rowsOf(x, rows, tile, k)
      const right = operandMap(cuda, weight, { matrices: experts, outer: n, tile: tile.n, k, across: false })
      kernel?.t(launch, y.pointer, left, right, offsets, rows, n, k, experts, y.ld)
    },
    layout(order, _positions, offsets, dweights, { rows, experts }) {
      const packed = packedRows(rows, experts)
      const [slots, at] = [packed, rows].map(count => cuda.scratch(count * 4).pointer)
      const grid = Math.min(Math.ceil(packed / 256), cuda.multiprocessors * 16)
      places({ grid, block: 256 }, slots, at, dweights, order, offsets, packed, rows, experts)
      return { rows: packed, slots, places: at }
    },
    backward(y, pairs, offsets, sizes) {
      const { rows, n, k, experts } = sizes
      const { tile, kernel, launch } = launchOf(sizes)
      const outer = packedRows(rows, experts)
      const [first, second = first] = pairs.map(([x, weight]) => [
        rowsOf(x, outer, tile, k),
        operandMap(cuda, weight, { matrices: experts, outer: n, tile: tile.n, k, across: true }),
      ])
      kernel?.n(launch, y.pointer, ...first, ...second, pairs.length, offsets, rows, n, k, experts, y.ld)
    },
    weightGradient,
  }
}
