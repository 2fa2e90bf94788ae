/**
 * @file Infers shape and dtype of every primitive's outputs and validates all user input. Backends validate nothing.
 */
import type { TensorSpec, Value } from './backend.ts'
import { isSize, needDtype, needKnownDtype, needList, needShape, needSizes, shapeError } from './checks.ts'
import type { DType } from './dtype.ts'
import { MoeError, shown } from './errors.ts'
import type { PrimitiveAttrs, PrimitiveName } from './ops.ts'
import { broadcastShapes, normalizeAxis, type Shape, sameShape, showShape, sizeOf } from './shape.ts'

/** Primitives whose output shape the caller gives. */
export type GivenName = 'fill' | 'reshape' | 'expand' | 'slice' | 'pad'
/** Primitives whose output shapes follow from their inputs and attributes. */
export type InferredName = Exclude<PrimitiveName, GivenName>

type Infer<P extends PrimitiveName> = (inputs: readonly Value[], attrs: PrimitiveAttrs[P]) => TensorSpec[]

function sameDtype(op: string, a: Value, b: Value): DType {
  if (a.dtype !== b.dtype) {
    throw new MoeError({
      code: 'E_DTYPE',
      op,
      problem: `dtypes differ, lhs ${a.dtype} rhs ${b.dtype}`,
      fix: 'cast one of them with .cast(dtype)',
      details: { lhs: a.dtype, rhs: b.dtype },
    })
  }
  return a.dtype
}

function arithmetic(op: string, value: Value): void {
  if (value.dtype !== 'f32' && value.dtype !== 'i32') needDtype(op, 'input', value, 'f32', 'i32')
}

const integerUnary = new Set(['neg', 'abs', 'sign'])

export const infer: { readonly [P in InferredName]: Infer<P> } = {
  unary([x], { code }) {
    if (x.dtype !== 'f32' && !(x.dtype === 'i32' && integerUnary.has(code))) needDtype(code, 'input', x, 'f32')
    return [x]
  },

  binary([a, b], { code }) {
    const dtype = sameDtype(code, a, b)
    if (dtype !== 'f32') {
      arithmetic(code, a)
      if (code === 'pow') needDtype(code, 'input', a, 'f32')
    }
    return [{ shape: broadcastShapes(code, a.shape, b.shape), dtype }]
  },

  compare([a, b], { code }) {
    sameDtype(code, a, b)
    arithmetic(code, a)
    return [{ shape: broadcastShapes(code, a.shape, b.shape), dtype: 'u8' }]
  },

  where([condition, a, b]) {
    needDtype('where', 'condition', condition, 'u8')
    const dtype = sameDtype('where', a, b)
    arithmetic('where', a)
    const shape = broadcastShapes('where', condition.shape, broadcastShapes('where', a.shape, b.shape))
    return [{ shape, dtype }]
  },

  cast([x], { dtype }) {
    needKnownDtype('cast', dtype)
    return [{ shape: x.shape, dtype }]
  },

  reduce([x], { code, axes }) {
    arithmetic(code, x)
    const shape = x.shape.slice()
    for (const axis of axes) shape[axis] = 1
    return [{ shape, dtype: x.dtype }]
  },

  cumsum([x]) {
    arithmetic('cumsum', x)
    return [x]
  },

  topk([x], { k }) {
    needDtype('topk', 'input', x, 'f32')
    const size = x.shape[x.shape.length - 1]
    if (x.shape.length === 0 || !Number.isInteger(k) || k < 1 || k > size) {
      throw shapeError(
        'topk',
        `k is ${shown(k)}, out of range for the last axis of ${showShape(x.shape)}`,
        'pass a k from 1 to the size of that axis',
      )
    }
    const shape = x.shape.slice(0, -1)
    shape.push(k)
    return [
      { shape, dtype: 'f32' },
      { shape, dtype: 'i32' },
    ]
  },

  matmul([a, b], { transposeA, transposeB }) {
    needDtype('matmul', 'lhs', a, 'f32')
    needDtype('matmul', 'rhs', b, 'f32')
    // `foldMatmul` has checked the leading axes.
    const rank = a.shape.length
    const m = a.shape[rank - (transposeA ? 1 : 2)]
    const k = a.shape[rank - (transposeA ? 2 : 1)]
    const kb = b.shape[rank - (transposeB ? 1 : 2)]
    const n = b.shape[rank - (transposeB ? 2 : 1)]
    if (k !== kb) {
      throw shapeError(
        'matmul',
        `inner sizes differ, lhs ${showShape(a.shape)}${transposeA ? ' transposed' : ''} rhs ${showShape(b.shape)}${transposeB ? ' transposed' : ''}: ${k} != ${kb}`,
        `pass { transposeB: ${!transposeB} } or reshape one side`,
        { lhs: a.shape, rhs: b.shape },
      )
    }
    return [{ shape: rank === 2 ? [m, n] : [a.shape[0], m, n], dtype: 'f32' }]
  },

  takeRows([x, index]) {
    needDtype('takeRows', 'index', index, 'i32')
    if (x.shape.length === 0)
      throw shapeError('takeRows', 'x is a scalar, which has no rows', 'pass a tensor with at least one axis')
    return [{ shape: index.shape.concat(x.shape.slice(1)), dtype: x.dtype }]
  },

  scatterAddRows([index, source], { rows }) {
    needDtype('scatterAddRows', 'index', index, 'i32')
    arithmetic('scatterAddRows', source)
    const rank = index.shape.length
    if (!sameShape(index.shape, source.shape.slice(0, rank))) {
      throw shapeError(
        'scatterAddRows',
        `the shape of source, ${showShape(source.shape)}, does not start with the shape of index, ${showShape(index.shape)}`,
        'pass one row of source for each entry of index',
      )
    }
    if (!isSize(rows)) {
      const problem = `rows is ${shown(rows)}, expected a non-negative integer`
      throw shapeError('scatterAddRows', problem, 'pass the number of rows of the result')
    }
    return [{ shape: [rows, ...source.shape.slice(rank)], dtype: source.dtype }]
  },

  setRows([x, index, source]) {
    needDtype('setRows', 'index', index, 'i32')
    sameDtype('setRows', x, source)
    needShape('setRows', 'index', index, [-1])
    needShape('setRows', 'source', source, [index.shape[0], ...x.shape.slice(1)])
    return [{ shape: x.shape, dtype: x.dtype }]
  },

  permute([x], { axes }) {
    const seen = new Set(axes)
    const valid = axes.length === x.shape.length && seen.size === axes.length
    if (!valid || axes.some(axis => !(Number.isInteger(axis) && axis >= 0 && axis < x.shape.length))) {
      const problem = `axes [${axes}] are not a permutation of the axes of ${showShape(x.shape)}`
      throw shapeError('permute', problem, `pass each axis from 0 to ${x.shape.length - 1} once`)
    }
    return [{ shape: axes.map(axis => x.shape[axis]), dtype: x.dtype }]
  },

  concat(parts, { axis }) {
    if (parts.length === 0) throw shapeError('concat', 'the list of tensors is empty', 'pass at least one tensor')
    const [first] = parts
    const shape = first.shape.slice()
    for (let i = 1; i < parts.length; i++) {
      const part = parts[i]
      sameDtype('concat', first, part)
      const fits =
        part.shape.length === shape.length && part.shape.every((size, at) => at === axis || size === shape[at])
      if (!fits) {
        throw shapeError(
          'concat',
          `part ${i} has shape ${showShape(part.shape)}, part 0 ${showShape(first.shape)}`,
          `make all sizes except that of axis ${axis} equal`,
        )
      }
      shape[axis] += part.shape[axis]
    }
    return [{ shape, dtype: first.dtype }]
  },
}

/**
 * Returns the target shape of a reshape, with -1 replaced by the inferred size.
 * @throws MoeError E_SHAPE if the number of elements differs
 */
export function inferReshape(x: Value, shape: Shape): Shape {
  needList('reshape', 'the shape', shape)
  const total = sizeOf(x.shape)
  let known = 1
  let free = -1
  for (let i = 0; i < shape.length; i++) {
    if (shape[i] === -1 && free === -1) free = i
    else known *= shape[i]
  }
  const out = shape.slice()
  if (free >= 0) out[free] = known === 0 ? 0 : total / known
  if (sizeOf(out) !== total || out.some(size => !Number.isInteger(size) || size < 0)) {
    throw shapeError(
      'reshape',
      `${showShape(x.shape)} has ${total} elements and cannot become ${showShape(shape)}`,
      'pass sizes with the same product (one may be -1)',
      { shape: x.shape, wanted: shape },
    )
  }
  return out
}

/**
 * Returns the shape of x with leading axes of size 1 added up to the rank of `shape`, to which it then expands.
 * @throws MoeError E_SHAPE if x does not broadcast to `shape`
 */
export function inferExpand(x: Value, shape: Shape): Shape {
  needSizes('expand', shape)
  const lead = shape.length - x.shape.length
  if (lead < 0 || !x.shape.every((size, i) => size === 1 || size === shape[lead + i])) {
    const problem = `${showShape(x.shape)} does not broadcast to ${showShape(shape)}`
    throw shapeError('expand', problem, 'counting axes from the right, change only sizes of 1, or add leading axes')
  }
  return [...new Array<number>(lead).fill(1), ...x.shape]
}

/** Returns the shape of a slice. @throws MoeError E_SHAPE if it is out of range */
export function inferSlice(x: Value, starts: readonly number[], sizes: Shape): Shape {
  needList('slice', 'starts', starts)
  needList('slice', 'sizes', sizes)
  const rank = x.shape.length
  const fits =
    starts.length === rank &&
    sizes.length === rank &&
    x.shape.every((size, i) => isSize(starts[i]) && isSize(sizes[i]) && starts[i] + sizes[i] <= size)
  if (fits) return sizes.slice()
  const problem = `starts ${shown(starts)} and sizes ${shown(sizes)} are out of range for ${showShape(x.shape)}`
  throw shapeError('slice', problem, 'pass a start and a size for each axis, with start + size at most its size')
}

/** Returns the slice that is part of one axis. @throws MoeError E_SHAPE, E_ATTR if it is out of range */
export function inferNarrow(x: Value, axis: number, start: number, end: number): { starts: number[]; sizes: number[] } {
  const at = normalizeAxis('narrow', axis, x.shape.length)
  if (!isSize(start) || !isSize(end) || start > end || end > x.shape[at]) {
    const problem = `start ${shown(start)} and end ${shown(end)} are out of range for axis ${axis} of ${showShape(x.shape)}`
    throw shapeError('narrow', problem, `pass 0 <= start <= end <= ${x.shape[at]}; the end is exclusive`)
  }
  const starts = new Array<number>(x.shape.length).fill(0)
  const sizes = x.shape.slice()
  starts[at] = start
  sizes[at] = end - start
  return { starts, sizes }
}

/** Returns the shape of a padded tensor. @throws MoeError E_SHAPE if the lists do not fit it */
export function inferPad(x: Value, before: readonly number[], after: readonly number[]): Shape {
  needList('pad', 'before', before)
  needList('pad', 'after', after)
  const rank = x.shape.length
  if (before.length !== rank || after.length !== rank || ![...before, ...after].every(isSize)) {
    const problem = `before ${shown(before)} and after ${shown(after)} do not fit ${showShape(x.shape)}`
    throw shapeError('pad', problem, 'pass a non-negative integer for each axis in both')
  }
  return x.shape.map((size, i) => size + before[i] + after[i])
}

/** Shapes for a product of more than two axes. */
export interface FoldedMatmul {
  /** The shape of each side for the primitive, which multiplies matrices (rank 2), or a batch of them (rank 3). */
  readonly a: Shape
  readonly b: Shape
  /** The axes of the result in place of the first of the primitive's result. */
  readonly lead: Shape
}

/**
 * Folds the leading axes of a matrix product: into the rows of the left side if the right side is a matrix, otherwise
 * into a batch.
 * @throws MoeError E_SHAPE
 */
export function foldMatmul(a: Shape, b: Shape, transposeA: boolean): FoldedMatmul {
  if (a.length < 2 || b.length < 2) {
    throw shapeError(
      'matmul',
      `both sides need at least 2 axes, lhs ${showShape(a)} rhs ${showShape(b)}`,
      'reshape vectors first',
    )
  }
  if (b.length === 2 && !transposeA) {
    const lead = a.slice(0, -1)
    return { a: [sizeOf(lead), a[a.length - 1]], b, lead }
  }
  const lead = a.slice(0, -2)
  if (!sameShape(lead, b.slice(0, -2))) {
    throw shapeError(
      'matmul',
      `leading axes differ, lhs ${showShape(a)} rhs ${showShape(b)}`,
      'expand one of them, or pass a rhs of rank 2',
      { lhs: a, rhs: b },
    )
  }
  const batch = sizeOf(lead)
  return { a: [batch, ...a.slice(-2)], b: [batch, ...b.slice(-2)], lead }
}
