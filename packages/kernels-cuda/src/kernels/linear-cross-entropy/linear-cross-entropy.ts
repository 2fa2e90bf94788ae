/**
 * @file Cross-entropy of the logits x weight^T without storing them: the vocabulary is processed in chunks, whose rounded weights and gradients of logits fit in
 * bounded scratch memory. Each weight is rounded once, and its gradient is written once.
 */
import type { Value, WidePrecision } from '@moe/core'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { type Logits, logitsOnHopper } from '../linear-cross-entropy-sm90a/logits.ts'
import { gemm } from '../matmul/gemm.ts'
import { operands, paddedColumns, type Round, roundToBf16, wholeMatrix } from '../matmul/operands.ts'
import { chooseTile, countTiles, type Tile, tiles, timeOf } from '../matmul/tiles.ts'
import { hopperTiles } from '../matmul-sm90a/product.ts'

/** Approximate scratch memory of a chunk. Tests make it small. */
export const limits = { chunkBytes: 2 ** 27 }

const variants = [...tiles.f32, ...tiles.bf16].map(tile => tile.name)

/** Rows of the weight per chunk, in whole tiles, if each takes `bytes` of scratch memory. */
const chunkSize = (bytes: number, tile: Tile) =>
  Math.max(1, Math.floor(limits.chunkBytes / Math.max(1, bytes) / tile.n)) * tile.n

/**
 * Classes per chunk: whole tiles, at least half of `most`. Chooses the number that leaves the fewest idle multiprocessors in the last waves of blocks, both when
 * logits are computed and when their gradient is multiplied by x.
 */
export function evenChunk(
  cuda: Pick<Cuda, 'multiprocessors'>,
  among: readonly Tile[],
  tile: Tile,
  most: number,
  { rows, features }: { readonly rows: number; readonly features: number },
): number {
  const time = (size: number) => {
    const logits = timeOf(cuda, tile, countTiles(tile, rows, size)) * features
    const weights = Math.min(...among.map(t => timeOf(cuda, t, countTiles(t, size, features)))) * rows
    return (logits + weights) / size
  }
  let best = most
  for (let size = most - tile.n; size >= most / 2; size -= tile.n) if (time(size) < time(best)) best = size
  return best
}

/**
 * The weight in chunks, as operands of a product. In bf16 the whole weight is rounded if it fits in the scratch memory of a chunk; otherwise chunks use
 * the same scratch memory one after another.
 */
function* chunks(cuda: Cuda, round: Round, precision: WidePrecision, weight: Value, most: number) {
  const [classes, columns] = weight.shape
  const ld = paddedColumns(columns)
  const isBf16 = precision === 'bf16'
  const [whole] = isBf16 && classes * ld * 2 <= limits.chunkBytes ? round([wholeMatrix(weight, classes, columns)]) : []
  const to = isBf16 && whole === undefined ? cuda.scratch(Math.min(most, classes) * ld * 2).pointer : undefined
  for (let first = 0; first < classes; first += most) {
    const rows = Math.min(most, classes - first)
    const pointer = pointerOf(weight) + first * columns * 4
    const [right] = whole
      ? [{ pointer: whole.pointer + first * ld * 2, ld }]
      : operands(round, precision, [{ pointer, rows, columns, to }])
    yield { first, size: rows, right }
  }
}

/** The forward or backward kernels with warp-level products (gemm.cuh). */
function logitsByWarps(cuda: Cuda, direction: 'fwd' | 'bwd'): Logits {
  const signature = direction === 'fwd' ? 'p p p p p p i i i i i i i i' : 'p p p p p p i i i i i i i i i'
  const kernels = new Map(
    variants.map(name => [
      name,
      cuda.kernel('linear-cross-entropy', `moe_linear_cross_entropy_${direction}_${name}`, signature),
    ]),
  )
  return (tile, outputs, x, weight, inputs, { rows, classes, features }, rest) =>
    kernels.get(tile.name)?.(
      { grid: countTiles(tile, rows, classes), block: tile.threads, shared: tile.shared },
      ...outputs,
      x.pointer,
      weight.pointer,
      ...inputs,
      rows,
      classes,
      features,
      x.ld,
      weight.ld,
      ...rest,
    )
}

/** Chooses the kernels and the tile for a product of this size. */
function logitsOf(cuda: Cuda, direction: 'fwd' | 'bwd') {
  const byWarps = logitsByWarps(cuda, direction)
  const onHopper = cuda.onHopper('linear-cross-entropy') ? logitsOnHopper(cuda, direction) : undefined
  return (precision: WidePrecision, rows: number, classes: number, features: number) => {
    const hopper = precision === 'bf16' && features > 0 ? onHopper : undefined
    const among = hopper ? hopperTiles : tiles[precision]
    const tile = chooseTile(cuda, among, t => countTiles(t, rows, classes))
    return { among, tile, logits: hopper ?? byWarps }
  }
}

export const linearCrossEntropy: FusedFactory<'linearCrossEntropy'> = cuda => {
  const round = roundToBf16(cuda)
  const choose = logitsOf(cuda, 'fwd')
  const finish = cuda.kernel('linear-cross-entropy', 'moe_linear_cross_entropy_finish_f32', 'p p p p p p i i i i')
  return ([x, weight, targets], { ignoreIndex, precision }, [lossSpec, lseSpec]) => {
    const loss = cuda.output(lossSpec)
    const lse = cuda.output(lseSpec)
    const [rows, features] = x.shape
    const classes = weight.shape[0]
    if (rows === 0) return [loss, lse]
    const { tile, logits } = choose(precision, rows, classes, features)
    const tilesTotal = Math.ceil(classes / tile.n)
    const highest = cuda.scratch(rows * tilesTotal * 4).pointer
    const total = cuda.scratch(rows * tilesTotal * 4).pointer
    const targetLogit = cuda.scratch(rows * 4).pointer
    const [left] = operands(round, precision, [wholeMatrix(x, rows, features)])
    for (const { first, size, right } of chunks(cuda, round, precision, weight, chunkSize(features * 2, tile))) {
      logits(
        tile,
        [highest, total, targetLogit],
        left,
        right,
        [pointerOf(targets)],
        { rows, classes: size, features },
        [first, first / tile.n, tilesTotal],
      )
    }
    finish(
      { grid: Math.min(Math.ceil(rows / 8), cuda.multiprocessors * 16), block: 256 },
      loss.pointer,
      lse.pointer,
      highest,
      total,
      targetLogit,
      pointerOf(targets),
      rows,
      classes,
      tilesTotal,
      ignoreIndex,
    )
    return [loss, lse]
  }
}

export const linearCrossEntropyBackward: FusedFactory<'linearCrossEntropyBackward'> = cuda => {
  const round = roundToBf16(cuda)
  const multiply = gemm(cuda)
  const choose = logitsOf(cuda, 'bwd')
  return ([x, weight, targets, lse, dloss], { ignoreIndex, precision }, [dxSpec, dweightSpec]) => {
    const dx = cuda.output(dxSpec)
    const dweight = cuda.output(dweightSpec)
    const [rows, features] = x.shape
    const classes = weight.shape[0]
    const { among, tile, logits } = choose(precision, rows, classes, features)
    const [left] = rows * features === 0 ? [] : operands(round, precision, [wholeMatrix(x, rows, features)])
    if (left === undefined || classes === 0) {
      cuda.clear(dx.pointer, rows * features * 4)
      cuda.clear(dweight.pointer, classes * features * 4)
      return [dx, dweight]
    }
    const elementBytes = precision === 'bf16' ? 2 : 4
    const fitting = chunkSize((rows + features) * elementBytes, tile)
    const most = classes <= fitting ? classes : evenChunk(cuda, among, tile, fitting, { rows, features })
    const { pointer } = cuda.scratch(rows * paddedColumns(Math.min(most, classes)) * elementBytes)
    for (const { first, size, right } of chunks(cuda, round, precision, weight, most)) {
      const dlogits = { pointer, ld: paddedColumns(size) }
      logits(
        tile,
        [dlogits.pointer],
        left,
        right,
        [pointerOf(targets), pointerOf(lse), pointerOf(dloss)],
        { rows, classes: size, features },
        [dlogits.ld, first, classes, ignoreIndex],
      )
      multiply(precision, dx.pointer, dlogits, right, {
        m: rows,
        n: features,
        k: size,
        transposeA: false,
        transposeB: false,
        add: first > 0,
      })
      multiply(precision, dweight.pointer + first * features * 4, dlogits, left, {
        m: size,
        n: features,
        k: rows,
        transposeA: true,
        transposeB: false,
      })
    }
    return [dx, dweight]
  }
}
