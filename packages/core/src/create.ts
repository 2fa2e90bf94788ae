/** @file Functions that create tensors: from host numbers, a constant or random numbers. */
import type { Backend, TensorSpec } from './backend.ts'
import { attrError, checkBackend, isSize, needKnownDtype, needSizes, shapeError } from './checks.ts'
import { defaultBackend } from './default-backend.ts'
import { type DType, encodeHost, type HostArray, hostArray } from './dtype.ts'
import { describe, MoeError, shown } from './errors.ts'
import { checkOptions, type OptionNames } from './options.ts'
import type { Random } from './random.ts'
import { type Shape, showShape, sizeOf } from './shape.ts'
import { Tensor } from './tensor.ts'

/** Dtype and backend of a new tensor. */
export interface CreateOptions {
  /** Default: f32; `tensor` infers it from the type of the values. */
  readonly dtype?: DType | undefined
  /** Default: the backend set by `setDefaultBackend`. */
  readonly backend?: Backend | undefined
}

const createNames: OptionNames<CreateOptions> = { dtype: true, backend: true }

/**
 * Checks shape, dtype and backend. A tensor is accepted as options too, for its dtype and backend: `zeros(shape, x)`.
 */
function checkCreate(op: string, shape: Shape, options: CreateOptions): void {
  if (!(options instanceof Tensor)) checkOptions(op, options, createNames)
  needSizes(op, shape)
  if (options.dtype !== undefined) needKnownDtype(op, options.dtype)
  if (options.backend !== undefined) checkBackend(op, options.backend)
}

function filled(op: string, shape: Shape, value: number, options: CreateOptions = {}): Tensor {
  checkCreate(op, shape, options)
  const { dtype = 'f32', backend = defaultBackend() } = options
  const specs: TensorSpec[] = [{ shape: shape.slice(), dtype }]
  return new Tensor(backend, backend.primitives.fill([], { value }, specs)[0], specs[0].shape, dtype)
}

/**
 * Returns a tensor with every element set to `value`.
 * @throws MoeError E_SHAPE if a size is negative or not an integer, E_DTYPE for an unknown dtype, E_ATTR if `value` is
 * not a number
 */
export function full(shape: Shape, value: number, options?: CreateOptions): Tensor {
  if (typeof value !== 'number') {
    throw attrError('full', `the value is ${describe(value)}, expected a number`, 'pass one: full([2, 3], 0.5)')
  }
  return filled('full', shape, value, options)
}

/** Returns a tensor of zeros. @throws MoeError E_SHAPE if a size is negative or not an integer */
export function zeros(shape: Shape, options?: CreateOptions): Tensor {
  return filled('zeros', shape, 0, options)
}

/** Returns a tensor of ones. @throws MoeError E_SHAPE if a size is negative or not an integer */
export function ones(shape: Shape, options?: CreateOptions): Tensor {
  return filled('ones', shape, 1, options)
}

/**
 * Creates a tensor from numbers. `shape` defaults to a vector. `dtype` defaults to i32 for an Int32Array, u8 for a
 * Uint8Array and f32 otherwise. Numbers are converted to the dtype; to pass raw bits of 16- or 8-bit floats, use
 * `fromHost`.
 * @throws MoeError E_SHAPE if the number of values does not match the shape, E_ATTR if the values are not numbers
 */
export function tensor(values: ArrayLike<number>, shape?: Shape, options: CreateOptions = {}): Tensor {
  needNumbers(values)
  const sizes = shape ?? [values.length]
  checkCreate('tensor', sizes, options)
  const natural = values instanceof Int32Array ? 'i32' : values instanceof Uint8Array ? 'u8' : 'f32'
  const dtype = options.dtype ?? natural
  needCount('tensor', values.length, sizes)
  return upload(encodeHost(dtype, values), sizes, dtype, options.backend)
}

/** Rejects values that would silently become NaN. */
function needNumbers(values: ArrayLike<number>): void {
  if (typeof values !== 'object' || !isSize(values?.length ?? -1))
    throw notNumbers(`the values are ${describe(values)}`)
  // The elements of a typed array are all of one type.
  const count = ArrayBuffer.isView(values) ? Math.min(values.length, 1) : values.length
  for (let i = 0; i < count; i++) {
    const value: unknown = values[i]
    if (typeof value !== 'number' && typeof value !== 'boolean') throw notNumbers(`value ${i} is ${describe(value)}`)
  }
}

const notNumbers = (problem: string) =>
  attrError('tensor', problem, 'pass a flat array of numbers and the shape: tensor([1, 2, 3, 4], [2, 2])')

/** Checks that an array is of the kind that carries the dtype. Other kinds would upload other bits. */
function needHostArray(data: HostArray, dtype: DType): void {
  const expected = hostArray(dtype, 0)[Symbol.toStringTag]
  if (data?.[Symbol.toStringTag] === expected) return
  throw new MoeError({
    code: 'E_DTYPE',
    op: 'fromHost',
    problem: `expected a ${expected} for ${dtype}, got ${describe(data)}`,
    fix: 'pass such an array, or numbers to tensor(values, shape, { dtype })',
  })
}

function needCount(op: string, count: number, shape: Shape): void {
  const size = sizeOf(shape)
  if (size === count) return
  throw shapeError(op, `got ${count} values for shape ${showShape(shape)}`, `pass ${size} values, or their shape`)
}

const upload = (data: HostArray, shape: Shape, dtype: DType, backend = defaultBackend()): Tensor =>
  new Tensor(backend, backend.upload(data, shape, dtype), shape.slice(), dtype)

/**
 * Creates a tensor from a host array that already contains the bits of the dtype. The array is copied.
 * @throws MoeError E_SHAPE if the number of values does not match the shape, E_DTYPE for another kind of array
 */
export function fromHost(data: HostArray, shape: Shape, dtype: DType, backend?: Backend): Tensor {
  checkCreate('fromHost', shape, { dtype, backend })
  needHostArray(data, dtype)
  needCount('fromHost', data.length, shape)
  return upload(data, shape, dtype, backend)
}

/** Returns the integers 0, 1, …, n-1 as i32, on `backend` (default: the one set by `setDefaultBackend`). */
export function arange(n: number, options: { backend?: Backend } = {}): Tensor {
  if (!isSize(n)) {
    throw attrError('arange', `n is ${shown(n)}, expected a non-negative integer`, 'pass the number of elements')
  }
  checkCreate('arange', [n], options)
  const values = Int32Array.from({ length: n }, (_, i) => i)
  return upload(values, [n], 'i32', options.backend)
}

function needRandom(op: string, random: Random | undefined): void {
  if (typeof random?.normal === 'function') return
  throw attrError(op, `the generator is ${describe(random)}`, `pass a generator: ${op}(shape, new Random(seed))`)
}

/**
 * Returns an f32 tensor of normally distributed numbers with mean 0 and the given standard deviation `std` (default 1),
 * on `backend` (default: the one set by `setDefaultBackend`).
 * @throws MoeError E_ATTR if no generator is passed or `std` is invalid, E_SHAPE for an invalid shape
 */
export function randn(shape: Shape, random: Random, options: { std?: number; backend?: Backend } = {}): Tensor {
  needRandom('randn', random)
  checkOptions('randn', options, { std: true, backend: true })
  const { std = 1, backend } = options
  checkCreate('randn', shape, { backend })
  if (!(Number.isFinite(std) && std >= 0)) {
    throw attrError('randn', `std is ${shown(std)}, expected a number of at least 0`, 'pass a standard deviation')
  }
  return upload(random.normal(sizeOf(shape), std), shape, 'f32', backend)
}

/**
 * Returns an f32 tensor of uniformly distributed numbers in [`low`, `high`), by default [0, 1), on `backend` (default:
 * the one set by `setDefaultBackend`).
 * @throws MoeError E_ATTR if no generator is passed or `low` and `high` are no range, E_SHAPE for an invalid shape
 */
export function rand(
  shape: Shape,
  random: Random,
  options: { low?: number; high?: number; backend?: Backend } = {},
): Tensor {
  needRandom('rand', random)
  checkOptions('rand', options, { low: true, high: true, backend: true })
  const { low = 0, high = 1, backend } = options
  checkCreate('rand', shape, { backend })
  if (!(Number.isFinite(low) && Number.isFinite(high) && low <= high)) {
    throw attrError('rand', `low is ${shown(low)} and high is ${shown(high)}`, 'pass numbers with low <= high')
  }
  const values = random.uniform(sizeOf(shape))
  for (let i = 0; i < values.length; i++) {
    values[i] = low + (high - low) * values[i]
    // It was rounded up to f32, out of the range.
    if (values[i] >= high) values[i] = low
  }
  return upload(values, shape, 'f32', backend)
}
