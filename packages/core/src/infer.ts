/**
 * @file Infers shape and dtype of every primitive's outputs and validates all user input. Backends validate nothing.
 */
import type { PrimitiveAttrs, PrimitiveName, Shape, TensorSpec, Value } from './backend.ts'
import { type DType, dtypeBytes, dtypes } from './dtype.ts'
import { MoeError, shown } from './errors.ts'
import { broadcastShapes, sameShape, showShape, sizeOf } from './shape.ts'

type Infer<P extends PrimitiveName> = (inputs: readonly Value[], attrs: PrimitiveAttrs[P]) => TensorSpec[]

export function shapeError(op: string, problem: string, fix?: string, details?: Record<string, unknown>): MoeError {
  return new MoeError({ code: 'E_SHAPE', op, problem, fix, details })
}

export function attrError(op: string, problem: string, fix?: string, details?: Record<string, unknown>): MoeError {
  return new MoeError({ code: 'E_ATTR', op, problem, fix, details })
}

/** Checks an input's dtype. @throws MoeError E_DTYPE */
export function needDtype(op: string, name: string, value: Value, ...allowed: DType[]): void {
  for (let i = 0; i < allowed.length; i++) if (value.dtype === allowed[i]) return
  throw new MoeError({
    code: 'E_DTYPE',
    op,
    problem: `${name} has dtype ${value.dtype}, expected ${allowed.join(' or ')}`,
    fix: `cast it with .cast('${allowed[0]}')`,
    details: { dtype: value.dtype, allowed },
  })
}

/**
 * Checks an input's shape; -1 matches any size.
 * @param fix what to pass, if the expected shape does not say it
 * @throws MoeError E_SHAPE
 */
export function needShape(op: string, name: string, value: Value, expected: Shape, fix?: string): void {
  const { shape } = value
  let ok = shape.length === expected.length
  for (let i = 0; ok && i < shape.length; i++) ok = expected[i] === -1 || shape[i] === expected[i]
  if (ok) return
  const wanted = `[${expected.map(size => (size === -1 ? '*' : size)).join(',')}]`
  throw shapeError(op, `${name} has shape ${showShape(shape)}, expected ${wanted}`, fix, { shape, expected })
}

/** Checks that sizes or axes are passed as an array, not one by one. @throws MoeError E_SHAPE */
export function needList(op: string, name: string, value: unknown, fix = 'pass an array such as [2, 3]'): void {
  if (Array.isArray(value)) return
  throw shapeError(op, `${name} is ${shown(value)}, not an array`, fix)
}

/** Checks that a dtype exists. @throws MoeError E_DTYPE */
export function needKnownDtype(op: string, dtype: DType): void {
  if (Object.hasOwn(dtypeBytes, dtype)) return
  throw new MoeError({
    code: 'E_DTYPE',
    op,
    problem: `${shown(dtype)} is not a dtype`,
    fix: `pass one of ${dtypes.join(', ')}`,
    details: { dtype },
  })
}

export const isSize = (n: number): boolean => Number.isInteger(n) && n >= 0

/** Checks a shape that the caller passed. @throws MoeError E_SHAPE */
export function needSizes(op: string, shape: Shape): void {
  needList(op, 'the shape', shape)
  for (let i = 0; i < shape.length; i++) {
    if (isSize(shape[i])) continue
    const problem = `expected sizes that are non-negative integers, got ${shown(shape)}`
    throw shapeError(op, problem, 'pass a shape such as [2, 3]', { shape })
  }
}

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

export const infer: { readonly [P in PrimitiveName]: Infer<P> } = {
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

  fill() {
    throw new Error('fill has no inputs to infer from')
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
    const rank = a.shape.length
    if (rank !== b.shape.length || (rank !== 2 && rank !== 3) || (rank === 3 && a.shape[0] !== b.shape[0])) {
      throw shapeError(
        'matmul',
        `leading axes differ, lhs ${showShape(a.shape)} rhs ${showShape(b.shape)}`,
        'give both the same leading axes, or a rhs of rank 2',
        { lhs: a.shape, rhs: b.shape },
      )
    }
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

  reshape() {
    throw new Error('reshape is given its shape')
  },

  permute([x], { axes }) {
    needList('permute', 'axes', axes)
    const seen = new Set(axes)
    const valid = axes.length === x.shape.length && seen.size === axes.length
    if (!valid || axes.some(axis => !(Number.isInteger(axis) && axis >= 0 && axis < x.shape.length))) {
      const problem = `axes [${axes}] are not a permutation of the axes of ${showShape(x.shape)}`
      throw shapeError('permute', problem, `pass each axis from 0 to ${x.shape.length - 1} once`)
    }
    return [{ shape: axes.map(axis => x.shape[axis]), dtype: x.dtype }]
  },

  expand() {
    throw new Error('expand is given its shape')
  },

  slice() {
    throw new Error('slice is given its shape')
  },

  pad() {
    throw new Error('pad is given its shape')
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
  let out = shape
  if (free >= 0) {
    out = shape.slice()
    ;(out as number[])[free] = known === 0 ? 0 : total / known
  }
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
