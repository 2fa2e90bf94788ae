/** @file Products with quantized weights `[N, K]`, dense and per expert. The formats are described in quantized-matmul.cu. */
import type { QuantizedAttrs, Value, WeightFormat, WidePrecision } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import { mostBlocks } from '../../modules.ts'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { isFew, mostRowTiles, multiplyGroups } from '../grouped-matmul/grouped-matmul.ts'
import { gemm, mostFewRows } from '../matmul/gemm.ts'
import { operands, paddedColumns, roundToBf16, wholeMatrix } from '../matmul/operands.ts'

/** Approximate scratch memory for the expanded weight; at least one expert. Tests make it small. */
export const limits = { chunkBytes: 2 ** 27 }

const bytesOf: Readonly<Record<WeightFormat, number>> = { bf16: 2, fp8: 1, int8: 1, int4: 0.5 }
const formats = Object.keys(bytesOf) as WeightFormat[]
const precisions: readonly WidePrecision[] = ['f32', 'bf16']

/** A quantized weight `[E, N, K]` (E = 1 if dense), and the kernel arguments that describe it. */
interface Weight {
  readonly q: number
  /** 0 for bf16. */
  readonly scale: number
  /** 0 if dense. */
  readonly offsets: number
  readonly experts: number
  readonly rows: number
  readonly columns: number
  readonly attrs: QuantizedAttrs
  /** Bytes per row of q. */
  readonly rowBytes: number
  /** Scales per expert. */
  readonly scales: number
  /** Rows of q, and blocks that share a scale, consist of runs of this many values: 32, 8 or 1. */
  readonly run: number
}

function describe(q: Value, scale: Value | undefined, offsets: Value | undefined, attrs: QuantizedAttrs) {
  const rows = q.shape[q.shape.length - 2]
  const {
    format,
    block: [blockRows, blockColumns],
    columns,
  } = attrs
  const weight: Weight = {
    q: pointerOf(q),
    scale: scale === undefined ? 0 : pointerOf(scale),
    offsets: offsets === undefined ? 0 : pointerOf(offsets),
    experts: offsets === undefined ? 1 : q.shape[0],
    rows,
    columns,
    attrs,
    rowBytes: Math.ceil(columns * bytesOf[format]),
    scales: Math.ceil(rows / blockRows) * Math.ceil(columns / blockColumns),
    run: [32, 8, 1].find(run => columns % run === 0 && (format === 'bf16' || blockColumns % run === 0)) ?? 1,
  }
  return weight
}

const sizesOf = ({ rows, columns, attrs }: Weight) => [rows, columns, ...attrs.block]

/** Computes y directly from the quantized weight, for at most mostFewRows rows of x, or that many per expert. */
function fewRows(cuda: Cuda) {
  const kernels = new Map(
    formats.flatMap(format =>
      ['whole', 'any', 'tensor_f32', 'tensor_bf16'].map(form => {
        const variant = `${format}_${form}`
        return [
          variant,
          cuda.kernel('quantized-matmul', `moe_quantized_matmul_few_${variant}`, 'p p p p p i i i i i i'),
        ]
      }),
    ),
  )
  return (y: number, x: number, weight: Weight, m: number, groups: number) => {
    const { q, scale, offsets, experts, rows, run, attrs } = weight
    // With about one row per expert, ordinary cores keep up with memory, in f32 whatever the precision.
    const tensor = m > experts && run === 32
    const form = tensor ? `tensor_${attrs.precision}` : run === 1 ? 'any' : 'whole'
    const grid = [Math.ceil(rows / (tensor ? 16 : 4)), groups]
    const pointers = [y, x, q, scale, offsets]
    kernels.get(`${attrs.format}_${form}`)?.(
      { grid, block: tensor ? 256 : 128 },
      ...pointers,
      m,
      experts,
      ...sizesOf(weight),
    )
  }
}

/** Part of a weight: some experts, or some rows of a dense weight. */
interface Chunk {
  readonly expert: number
  readonly experts: number
  readonly row: number
  readonly rows: number
  readonly matrix: Matrix
}

/** The weight as operands of a product, in chunks that use the same scratch memory one after another. */
function chunksOf(cuda: Cuda) {
  const kernels = new Map(
    formats.flatMap(format =>
      precisions.map(precision => {
        const variant = `${format}_${precision}`
        const signature = 'p p p p i i i i i i i i i'
        return [variant, cuda.kernel('quantized-matmul', `moe_quantized_matmul_expand_${variant}`, signature)]
      }),
    ),
  )
  return function* (weight: Weight): Generator<Chunk> {
    const { q, scale, offsets, experts, rows, columns, attrs, rowBytes, scales, run } = weight
    const { format, precision } = attrs
    const ld = paddedColumns(columns)
    if (format === 'bf16' && precision === 'bf16' && ld === columns) {
      yield { expert: 0, experts, row: 0, rows, matrix: { pointer: q, ld } }
      return
    }
    const bytes = ld * (precision === 'bf16' ? 2 : 4)
    const most = Math.max(1, Math.floor(limits.chunkBytes / Math.max(1, bytes)))
    // Chunks of rows start at whole tiles of any size.
    const mostRows = offsets === 0 ? Math.min(rows, Math.max(256, Math.floor(most / 256) * 256)) : rows
    const mostExperts = Math.min(experts, Math.max(1, Math.floor(most / rows)))
    const { pointer } = cuda.scratch(mostExperts * mostRows * bytes)
    for (let expert = 0; expert < experts; expert += mostExperts) {
      for (let row = 0; row < rows; row += mostRows) {
        const chunk = {
          expert,
          experts: Math.min(mostExperts, experts - expert),
          row,
          rows: Math.min(mostRows, rows - row),
          matrix: { pointer, ld },
        }
        const all = chunk.experts * chunk.rows
        kernels.get(`${format}_${precision}`)?.(
          { grid: Math.min(Math.ceil((all * ld) / 8 / 256), cuda.multiprocessors * 16), block: 256 },
          pointer,
          q + (expert * rows + row) * rowBytes,
          scale === 0 ? 0 : scale + expert * scales * 4,
          offsets === 0 ? 0 : offsets + expert * 4,
          all,
          chunk.rows,
          row,
          ld,
          +(run > 1),
          ...sizesOf(weight),
        )
        yield chunk
      }
    }
  }
}

export const quantizedMatmul: FusedFactory<'quantizedMatmul'> = cuda => {
  const few = fewRows(cuda)
  const chunks = chunksOf(cuda)
  const round = roundToBf16(cuda)
  const multiply = gemm(cuda)
  const place = cuda.kernel('quantized-matmul', 'moe_quantized_matmul_place_f32', 'p p i i i i')
  return ([x, q, scale], attrs, [spec]) => {
    const y = cuda.output(spec)
    const [m, n] = spec.shape
    const k = x.shape[1]
    if (m * n === 0) return [y]
    const weight = describe(q, scale, undefined, attrs)
    const { precision, transposeW } = attrs
    if (transposeW && m <= mostFewRows) {
      few(y.pointer, pointerOf(x), weight, m, 1)
      return [y]
    }
    const [left] = operands(round, precision, [wholeMatrix(x, m, k)])
    if (!transposeW) {
      if (k === 0) cuda.clear(y.pointer, m * n * 4)
      // Each chunk reads as many columns of x as it has rows.
      for (const { row, rows, matrix } of chunks(weight)) {
        const part = { pointer: left.pointer + row * (precision === 'bf16' ? 2 : 4), ld: left.ld }
        const product = { m, n, k: rows, transposeA: false, transposeB: false, add: row > 0 }
        multiply(precision, y.pointer, part, matrix, product)
      }
      return [y]
    }
    let part = 0
    for (const { row, rows, matrix } of chunks(weight)) {
      // The product writes contiguous results, so a chunk of y's columns is computed in scratch memory and copied.
      if (rows < n && part === 0) part = cuda.scratch(m * rows * 4).pointer
      const to = rows < n ? part : y.pointer
      multiply(precision, to, left, matrix, { m, n: rows, k, transposeA: false, transposeB: true })
      if (rows < n) {
        const grid = [Math.min(Math.ceil(rows / 256), 16), Math.min(m, mostBlocks[1])]
        place({ grid, block: 256 }, y.pointer, part, m, n, row, rows)
      }
    }
    return [y]
  }
}

export const quantizedGroupedMatmul: FusedFactory<'quantizedGroupedMatmul'> = cuda => {
  const multiply = multiplyGroups(cuda)
  const few = fewRows(cuda)
  const chunks = chunksOf(cuda)
  const round = roundToBf16(cuda)
  return ([x, q, offsets, scale], attrs, [spec]) => {
    const y = cuda.output(spec)
    const [m, n] = spec.shape
    const k = x.shape[1]
    if (m * n === 0) return [y]
    const weight = describe(q, scale, offsets, attrs)
    const { precision, transposeW } = attrs
    if (transposeW && isFew(m, weight.experts)) {
      few(y.pointer, pointerOf(x), weight, m, mostRowTiles(m, weight.experts, mostFewRows))
      return [y]
    }
    if (weight.experts * k === 0) {
      cuda.clear(y.pointer, m * n * 4)
      return [y]
    }
    const [left] = operands(round, precision, [wholeMatrix(x, m, k)])
    for (const { expert, experts, matrix } of chunks(weight)) {
      // Rows after the chunk's experts get zeros, until the next chunk overwrites them.
      const product = { rows: m, n, k, experts, transposeW }
      multiply(precision, y.pointer, left, matrix, weight.offsets + expert * 4, product)
    }
    return [y]
  }
}
