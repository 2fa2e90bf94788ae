/** @file Products with quantized weights: bf16, fp8, int8 or int4, with one scale per block. Activations stay f32. */
import type { Backend, TensorSpec } from '../backend.ts'
import { attrError, needDtype, needShape, shapeError } from '../checks.ts'
import { full } from '../create.ts'
import type { DType } from '../dtype.ts'
import { shown } from '../errors.ts'
import type { QuantizedAttrs, WeightFormat } from '../ops.ts'
import { widePrecision } from '../precision.ts'
import { concat, where } from '../primitives.ts'
import { scope } from '../scope.ts'
import { type Shape, showShape, sizeOf } from '../shape.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'
import { groupedMatmulDefinition } from './grouped-matmul.ts'
import { quantizeDefinition } from './quantize.ts'

/** A quantized weight `[N, K]` (or `[E, N, K]`, one per expert). */
export interface QuantizedWeight {
  /** Format of the elements of `q`. */
  readonly format: WeightFormat
  /** Rows and columns that share a scale. */
  readonly block: readonly [rows: number, columns: number]
  /** Shape of the original weight. The codes of an int4 row take half as many bytes. */
  readonly shape: readonly number[]
  /** The codes, `[N, K]` or `[E, N, K]`. In int4 two columns share a byte: `[..., ceil(K/2)]`. */
  readonly q: Tensor
  /** Scales of the blocks; null for bf16. */
  readonly scale: Tensor | null
}

const storedDtypes: Readonly<Record<WeightFormat, DType>> = { bf16: 'bf16', fp8: 'f8e4m3', int8: 'u8', int4: 'u8' }

/** fp8 as in the released DeepSeek-V3 weights; for integers, blocks within one row. */
const usualBlocks: Readonly<Record<WeightFormat, readonly [number, number]>> = {
  bf16: [1, 1],
  fp8: [128, 128],
  int8: [1, 128],
  int4: [1, 32],
}

/** The byte that encodes zero; in int4, two zeros. */
const zeroCodes: Readonly<Record<WeightFormat, number>> = { bf16: 0, fp8: 0, int8: 128, int4: 0x88 }

/** Stored elements of a row. Internal. */
export const storedColumns = (format: WeightFormat, columns: number): number =>
  format === 'int4' ? Math.ceil(columns / 2) : columns

/** Checks a format that a caller passed. Internal. @throws MoeError E_ATTR */
export function checkFormat(op: string, format: WeightFormat): void {
  if (Object.hasOwn(usualBlocks, format)) return
  const formats = Object.keys(usualBlocks).join(', ')
  throw attrError(op, `unknown weight format ${shown(format)}`, `choose one of ${formats}`)
}

function checkBlock(op: string, { format, block }: Pick<QuantizedAttrs, 'format' | 'block'>): void {
  checkFormat(op, format)
  const whole = block.length === 2 && block.every(size => Number.isInteger(size) && size >= 1)
  if (whole && (format !== 'int4' || block[1] % 2 === 0)) return
  const fix = format === 'int4' ? 'pass two positive integers, the second even, such as [1, 32]' : undefined
  throw attrError(op, `block = [${block}] is invalid for ${format}`, fix ?? 'pass two positive integers')
}

/** Checks x and the quantized weight `lead + [N, K]`. Returns the spec of their product. */
function checkProduct(
  op: string,
  x: Tensor,
  q: Tensor,
  scale: Tensor | undefined,
  attrs: QuantizedAttrs,
  lead: number[],
): TensorSpec[] {
  const { format, block, columns, transposeW } = attrs
  checkBlock(op, attrs)
  needDtype(op, 'input', x, 'f32')
  needDtype(op, 'weight', q, storedDtypes[format])
  needShape(op, 'weight', q, [...lead, -1, storedColumns(format, columns)])
  const rows = q.shape[lead.length]
  needShape(op, 'input', x, [-1, transposeW ? columns : rows])
  if ((scale === undefined) !== (format === 'bf16')) {
    throw shapeError(op, `${format} ${scale ? 'has no' : 'requires a'} scale`, 'pass a result of quantizeWeight')
  }
  if (scale !== undefined) {
    needDtype(op, 'scale', scale, 'f32')
    const blocks = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])]
    needShape(op, 'scale', scale, [...q.shape.slice(0, lead.length), ...blocks])
  }
  return [{ shape: [x.shape[0], transposeW ? rows : columns], dtype: 'f32' }]
}

/** Unpacks bytes of two 4-bit numbers, `[n, m]`, to f32 numbers `[n, columns]`, low half first. */
function unpackNibbles(bytes: Tensor, columns: number): Tensor {
  const [rows, width] = bytes.shape
  const both = bytes.cast('f32')
  const high = both.mul(1 / 16).floor()
  const low = both.sub(high.mul(16))
  const pairs = concat([low.reshape([rows, width, 1]), high.reshape([rows, width, 1])], 2)
  return pairs.reshape([rows, 2 * width]).narrow(1, 0, columns)
}

/** Returns the quantized weight as f32, `[..., N, K]`. */
function dequantize(
  q: Tensor,
  scale: Tensor | null,
  columns: number,
  { format, block }: Pick<QuantizedAttrs, 'format' | 'block'>,
): Tensor {
  const rows = q.shape[q.rank - 2]
  const matrices = sizeOf(q.shape.slice(0, -2))
  const flat = q.reshape([matrices * rows, q.shape[q.rank - 1]])
  const shape = [...q.shape.slice(0, -1), columns]
  let values: Tensor
  if (format === 'int4') values = unpackNibbles(flat, columns).sub(8)
  else if (format === 'int8') values = flat.cast('f32').sub(128)
  else values = flat.cast('f32')
  if (scale === null) return values.reshape(shape)
  const [down, across] = scale.shape.slice(-2)
  if (down * block[0] === rows && across * block[1] === columns) {
    const blocks = values.reshape([matrices * down, block[0], across, block[1]])
    return blocks.mul(scale.reshape([matrices * down, 1, across, 1])).reshape(shape)
  }
  const repeated = scale
    .reshape([matrices * down, 1, across, 1])
    .expand([matrices * down, block[0], across, block[1]])
    .reshape([matrices, down * block[0], across * block[1]])
    .slice([0, 0, 0], [matrices, rows, columns])
  return values.mul(repeated.reshape([matrices * rows, columns])).reshape(shape)
}

/**
 * `dequantize` as a constant input: neither it nor its codes and scales get gradients. If the product is recorded, the
 * result is freed with it.
 */
function constant(q: Tensor, scale: Tensor | null, columns: number, attrs: QuantizedAttrs): Tensor {
  const weight = scope(() => noGrad(() => dequantize(q, scale, columns, attrs)))
  weight.temporary = true
  return weight
}

/**
 * Approximate number of elements of a weight that are dequantized to f32 at once when x is multiplied by the
 * untransposed weight; at least one column of blocks. Tests make it small.
 */
export const untransposedLimits = { elements: 2 ** 22 }

/**
 * Computes x W `[M, K]` in pieces of some columns of the weight, which `multiply` gets as f32 `[..., N, part of K]`.
 * The sums are those of the whole weight, but only one piece at a time is in memory as f32.
 */
function inPieces(
  q: Tensor,
  scale: Tensor | null,
  attrs: QuantizedAttrs,
  multiply: (weight: Tensor) => Tensor,
): Tensor {
  const { format, block, columns } = attrs
  const rows = sizeOf(q.shape.slice(0, -1))
  // bf16 has no blocks, and with an odd number of columns, the last byte of an int4 row is half empty.
  const step = format === 'bf16' ? 1 : block[1]
  const most = Math.max(1, Math.floor(untransposedLimits.elements / (Math.max(1, rows) * step))) * step
  const piece = (from: number, to: number) => {
    if (to - from === columns) return multiply(constant(q, scale, columns, attrs))
    const last = q.rank - 1
    const [codes, scales] = noGrad(() => [
      q.narrow(last, storedColumns(format, from), storedColumns(format, to)),
      scale?.narrow(last, from / step, Math.ceil(to / step)) ?? null,
    ])
    return multiply(constant(codes, scales, to - from, attrs))
  }
  if (columns <= most) return piece(0, columns)
  const parts: Tensor[] = []
  for (let from = 0; from < columns; from += most) parts.push(scope(() => piece(from, Math.min(columns, from + most))))
  return concat(parts, 1)
}

export const quantizedMatmulDefinition: FusedDefinition<'quantizedMatmul'> = {
  name: 'quantizedMatmul',
  infer: ([x, q, scale], attrs) => checkProduct('quantizedMatmul', x, q, scale, attrs, []),
  decompose([x, q, scale = null], attrs) {
    const { columns, transposeW, precision } = attrs
    const multiply = (weight: Tensor) => x.matmul(weight, { transposeB: transposeW, precision })
    return [transposeW ? multiply(constant(q, scale, columns, attrs)) : inPieces(q, scale, attrs, multiply)]
  },
  vjp({ inputs: [, ...weight], attrs, needs }, [dy]) {
    if (dy === null || !needs(0)) return [null, null, null]
    const back = { ...attrs, transposeW: !attrs.transposeW }
    return [runFused(quantizedMatmulDefinition, [dy, ...weight], back)[0], null, null]
  },
}

export const quantizedGroupedMatmulDefinition: FusedDefinition<'quantizedGroupedMatmul'> = {
  name: 'quantizedGroupedMatmul',
  infer([x, q, offsets, scale], attrs): TensorSpec[] {
    needDtype('quantizedGroupedMatmul', 'offsets', offsets, 'i32')
    const spec = checkProduct('quantizedGroupedMatmul', x, q, scale, attrs, [-1])
    needShape('quantizedGroupedMatmul', 'offsets', offsets, [q.shape[0] + 1])
    return spec
  },
  decompose([x, q, offsets, scale = null], attrs) {
    const { columns, transposeW, precision } = attrs
    const multiply = (weight: Tensor) =>
      runFused(groupedMatmulDefinition, [x, weight, offsets], { transposeW, precision })[0]
    return [transposeW ? multiply(constant(q, scale, columns, attrs)) : inPieces(q, scale, attrs, multiply)]
  },
  vjp({ inputs: [, ...weight], attrs, needs }, [dy]) {
    if (dy === null || !needs(0)) return [null, null, null, null]
    const back = { ...attrs, transposeW: !attrs.transposeW }
    return [runFused(quantizedGroupedMatmulDefinition, [dy, ...weight], back)[0], null, null, null]
  },
}

/**
 * Rounds to integers within the range of the format. Each block has a scale such that its largest magnitude becomes the
 * largest integer.
 */
function quantizeIntegers(x: Tensor, format: 'int8' | 'int4', [blockRows, blockColumns]: readonly [number, number]) {
  const [rows, columns] = x.shape
  const down = Math.ceil(rows / blockRows)
  const across = Math.ceil(columns / blockColumns)
  const [largest, zero] = format === 'int8' ? [127, 128] : [7, 8]
  const padded = x.pad([0, 0], [down * blockRows - rows, across * blockColumns - columns])
  const blocks = padded.reshape([down, blockRows, across, blockColumns])
  const peak = blocks.abs().max([1, 3], true)
  const scale = where(peak.eq(0), full([], 1, peak), peak.mul(1 / largest))
  const codes = blocks
    .div(scale)
    .add(zero + 0.5)
    .floor()
    .reshape(padded.shape)
  return { codes, scale: scale.reshape([down, across]) }
}

/** Quantizes a matrix `[N, K]`. Returns codes and scales. */
function quantizeMatrix(x: Tensor, format: WeightFormat, block: readonly [number, number]): Tensor[] {
  const [rows, columns] = x.shape
  if (format === 'bf16') return [x.cast('bf16')]
  if (format === 'fp8') return runFused(quantizeDefinition, [x], { block })
  const { codes, scale } = quantizeIntegers(x, format, block)
  if (format === 'int8') return [codes.slice([0, 0], [rows, columns]).cast('u8'), scale]
  const width = Math.ceil(columns / 2)
  const pairs = codes.slice([0, 0], [rows, 2 * width]).reshape([rows, width, 2])
  const [low, high] = [0, 1].map(i => pairs.narrow(2, i, i + 1))
  return [low.add(high.mul(16)).reshape([rows, width]).cast('u8'), scale]
}

/**
 * Quantizes a weight `[N, K]` or `[E, N, K]`, rounding to the nearest code. `block` gives the rows and columns that
 * share a scale; default: 128 x 128 for fp8 (as in the released weights), 1 x 128 for int8, 1 x 32 for int4.
 * @throws MoeError E_SHAPE, E_DTYPE, E_ATTR
 */
export function quantizeWeight(weight: Tensor, format: WeightFormat, block = usualBlocks[format]): QuantizedWeight {
  const { shape } = weight
  checkBlock('quantizeWeight', { format, block })
  needDtype('quantizeWeight', 'weight', weight, 'f32')
  if (shape.length !== 2 && shape.length !== 3) {
    throw shapeError('quantizeWeight', `the weight has shape ${showShape(shape)}, expected [N, K] or [E, N, K]`)
  }
  const [rows, columns] = shape.slice(-2)
  const lead = shape.slice(0, -2)
  const matrices = sizeOf(lead)
  // A block must not span two experts.
  const apart = matrices > 1 && format !== 'bf16' && rows % block[0] !== 0
  const parts = apart
    ? Array.from({ length: matrices }, (_, e) =>
        quantizeMatrix(weight.narrow(0, e, e + 1).reshape([rows, columns]), format, block),
      )
    : [quantizeMatrix(weight.reshape([matrices * rows, columns]), format, block)]
  const q = concat(parts.map(part => part[0])).reshape([...lead, rows, storedColumns(format, columns)])
  if (format === 'bf16') return { format, block, shape, q, scale: null }
  const scale = concat(parts.map(part => part[1])).reshape([
    ...lead,
    Math.ceil(rows / block[0]),
    Math.ceil(columns / block[1]),
  ])
  return { format, block, shape, q, scale }
}

/** How a weight is stored with the usual blocks: dtype and shape of its codes, and shape of its scales. Internal. */
export function storedAs(shape: Shape, format: WeightFormat) {
  checkFormat('storedAs', format)
  const block = usualBlocks[format]
  const [rows, columns] = shape.slice(-2)
  const lead = shape.slice(0, -2)
  return {
    block,
    dtype: storedDtypes[format],
    stored: [...lead, rows, storedColumns(format, columns)],
    scales: [...lead, Math.ceil(rows / block[0]), Math.ceil(columns / block[1])],
  }
}

/** Returns what `quantizeWeight` makes of zeros, without allocating them. */
export function zeroWeight(shape: Shape, format: WeightFormat, backend?: Backend): QuantizedWeight {
  const { block, dtype, stored, scales } = storedAs(shape, format)
  const all = (value: number, dtype: DType, of: Shape) =>
    full(
      of.map(() => 1),
      value,
      { backend },
    )
      .cast(dtype)
      .expand(of)
  const q = all(zeroCodes[format], dtype, stored)
  return { format, block, shape, q, scale: format === 'bf16' ? null : all(1, 'f32', scales) }
}

/** Returns the quantized weight as f32. */
export function dequantizeWeight({ q, scale, shape, format, block }: QuantizedWeight): Tensor {
  return dequantize(q, scale, shape[shape.length - 1], { format, block })
}

const attrsOf = ({ format, block, shape }: QuantizedWeight): QuantizedAttrs => ({
  format,
  block,
  columns: shape[shape.length - 1],
  transposeW: true,
  precision: widePrecision(),
})

/**
 * Multiplies `x [..., K]` by the transposed quantized weight `[N, K]`, giving `[..., N]`.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function quantizedMatmul(x: Tensor, weight: QuantizedWeight): Tensor {
  const { q, scale } = weight
  const flat = x.rank === 2 ? x : x.reshape([sizeOf(x.shape.slice(0, -1)), x.shape[x.rank - 1]])
  const inputs = scale === null ? [flat, q] : [flat, q, scale]
  const [y] = runFused(quantizedMatmulDefinition, inputs, attrsOf(weight))
  return x.rank === 2 ? y : y.reshape([...x.shape.slice(0, -1), y.shape[1]])
}

/**
 * Multiplies rows `offsets[e]` to `offsets[e+1] - 1` of `x [M, K]` by the transposed quantized weight of expert e, `[E,
 * N, K]`: `groupedMatmul` for quantized weights.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function quantizedGroupedMatmul(x: Tensor, weight: QuantizedWeight, offsets: Tensor): Tensor {
  const { q, scale } = weight
  const inputs = scale === null ? [x, q, offsets] : [x, q, offsets, scale]
  return runFused(quantizedGroupedMatmulDefinition, inputs, attrsOf(weight))[0]
}
