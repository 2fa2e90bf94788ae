/** @file Checks of what callers pass: tensors, shapes, sizes, dtypes and backends. */
import type { Backend, Value } from './backend.ts'
import { type DType, dtypeBytes, dtypes } from './dtype.ts'
import { describe, MoeError, shown } from './errors.ts'
import { type Shape, showShape } from './shape.ts'

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

/** Checks that a caller passed a backend, and not a promise of one. Internal. @throws MoeError E_ATTR */
export function checkBackend(op: string, backend: Backend): void {
  if (backend?.primitives !== undefined) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `the backend is ${describe(backend)}`,
    fix: "pass an awaited backend: await firstAvailable([() => import('@moe/kernels-cpu')])",
  })
}

/** A tensor, as far as its checks know it. */
export interface Operand extends Value {
  readonly backend: Backend
  /** The fix to suggest if it was freed. */
  readonly fixIfDisposed: string
}

/** Checks that `value` is a tensor. Internal. @throws MoeError E_ATTR */
export function needTensor(op: string, name: string, value: Operand | null | undefined): void {
  // Anything with a backend counts as a tensor: every op runs this check, so it must be cheap.
  if (value?.backend !== undefined) return
  const fix = 'pass a tensor, such as tensor(numbers, shape)'
  throw attrError(op, `${name} is ${describe(value)}, not a tensor`, fix)
}

/**
 * Checks that the input of a module is a tensor with the given axes.
 * @param axes the size of each axis, or its name (for the message) if any size will do
 * @throws MoeError E_ATTR if it is not a tensor, E_SHAPE if its shape does not fit
 * @internal
 */
export function needAxes(op: string, x: Operand, axes: ReadonlyArray<string | number>): void {
  needTensor(op, 'the input', x)
  const isSameRank = x.shape.length === axes.length
  if (isSameRank && axes.every((axis, i) => typeof axis === 'string' || axis === x.shape[i])) return
  throw shapeError(
    op,
    `the input has shape ${showShape(x.shape)}, expected [${axes.join(', ')}]`,
    isSameRank ? 'create the module with the size of the input' : 'reshape it',
  )
}

/** Checks that a tensor was not freed. Internal. @throws MoeError E_DISPOSED */
export function needAlive(op: string, tensor: Operand): void {
  if (tensor.handle !== null) return
  throw new MoeError({
    code: 'E_DISPOSED',
    op,
    problem: `an input of shape ${showShape(tensor.shape)} was already freed`,
    fix: tensor.fixIfDisposed,
  })
}
