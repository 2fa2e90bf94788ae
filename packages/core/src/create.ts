/** @file Functions that create tensors: from host numbers, a constant or random numbers. */
import type { Backend, Shape, TensorSpec } from './backend.ts'
import { defaultBackend } from './context.ts'
import { type DType, encodeHost, type HostArray } from './dtype.ts'
import { describe } from './errors.ts'
import { attrError, needKnownDtype, needSizes, shapeError } from './infer.ts'
import { checkOptions, type OptionNames } from './options.ts'
import type { Random } from './random.ts'
import { showShape, sizeOf } from './shape.ts'
import { Tensor } from './tensor.ts'

/** Dtype and backend of a new tensor. */
export interface CreateOptions {
  /** Default: f32; `tensor` infers it from the type of the values. */
  readonly dtype?: DType
  /** Default: the backend set by `setDefaultBackend`. */
  readonly backend?: Backend
}

const createNames: OptionNames<CreateOptions> = { dtype: true, backend: true }

/** A tensor is accepted as options too, for its dtype and backend: `zeros(shape, x)`. */
function checkCreate(op: string, options: CreateOptions): void {
  if (!(options instanceof Tensor)) checkOptions(op, options, createNames)
}

/**
 * Returns a tensor with every element set to `value`.
 * @throws MoeError E_SHAPE if a size is negative or not an integer, E_DTYPE for an unknown dtype
 */
export function full(shape: Shape, value: number, options: CreateOptions = {}): Tensor {
  checkCreate('full', options)
  const { dtype = 'f32', backend = defaultBackend() } = options
  needSizes('full', shape)
  needKnownDtype('full', dtype)
  const specs: TensorSpec[] = [{ shape, dtype }]
  return new Tensor(backend, backend.primitives.fill([], { value }, specs)[0], shape, dtype)
}

/** Returns a tensor of zeros. @throws MoeError E_SHAPE if a size is negative or not an integer */
export function zeros(shape: Shape, options?: CreateOptions): Tensor {
  return full(shape, 0, options)
}

/** Returns a tensor of ones. @throws MoeError E_SHAPE if a size is negative or not an integer */
export function ones(shape: Shape, options?: CreateOptions): Tensor {
  return full(shape, 1, options)
}

/**
 * Creates a tensor from numbers. `shape` defaults to a vector. `dtype` defaults to i32 for an Int32Array, u8 for a
 * Uint8Array and f32 otherwise. Numbers are converted to the dtype; to pass raw bits of 16- or 8-bit floats, use
 * `fromHost`.
 * @throws MoeError E_SHAPE if the number of values does not match the shape, E_ATTR if the values are not numbers
 */
export function tensor(values: ArrayLike<number>, shape?: Shape, options: CreateOptions = {}): Tensor {
  needNumbers(values)
  checkCreate('tensor', options)
  const natural = values instanceof Int32Array ? 'i32' : values instanceof Uint8Array ? 'u8' : 'f32'
  const dtype = options.dtype ?? natural
  needKnownDtype('tensor', dtype)
  return fromHost(encodeHost(dtype, values), shape ?? [values.length], dtype, options.backend)
}

/** Rejects values that would silently become NaN. */
function needNumbers(values: ArrayLike<number> | undefined): void {
  const first: unknown = values?.[0]
  if (values?.length === 0 || typeof first === 'number' || typeof first === 'boolean') return
  const problem = first === undefined ? `the values are ${describe(values)}` : `value 0 is ${describe(first)}`
  throw attrError('tensor', problem, 'pass a flat array of numbers and the shape: tensor([1, 2, 3, 4], [2, 2])')
}

/** Creates a tensor from a host array that already contains the bits of the dtype. The array is copied. */
export function fromHost(data: HostArray, shape: Shape, dtype: DType, backend = defaultBackend()): Tensor {
  needSizes('fromHost', shape)
  needKnownDtype('fromHost', dtype)
  if (sizeOf(shape) !== data.length) {
    throw shapeError(
      'fromHost',
      `got ${data.length} values for shape ${showShape(shape)}, which has ${sizeOf(shape)} elements`,
    )
  }
  return new Tensor(backend, backend.upload(data, shape, dtype), shape, dtype)
}

/** Returns the integers 0, 1, …, n-1 as i32, on `backend` (default: the one set by `setDefaultBackend`). */
export function arange(n: number, options: { backend?: Backend } = {}): Tensor {
  checkCreate('arange', options)
  return fromHost(
    Int32Array.from({ length: n }, (_, i) => i),
    [n],
    'i32',
    options.backend,
  )
}

function needRandom(op: string, random: Random | undefined): void {
  if (typeof random?.normal === 'function') return
  throw attrError(op, `the generator is ${describe(random)}`, `pass a generator: ${op}(shape, new Random(seed))`)
}

/**
 * Returns an f32 tensor of normally distributed numbers with mean 0 and the given standard deviation `std` (default 1), on
 * `backend` (default: the one set by `setDefaultBackend`).
 * @throws MoeError E_ATTR if no generator is passed
 */
export function randn(shape: Shape, random: Random, options: { std?: number; backend?: Backend } = {}): Tensor {
  needRandom('randn', random)
  checkOptions('randn', options, { std: true, backend: true })
  return fromHost(random.normal(sizeOf(shape), options.std), shape, 'f32', options.backend)
}

/**
 * Returns an f32 tensor of uniformly distributed numbers in [`low`, `high`), by default [0, 1), on `backend` (default:
 * the one set by `setDefaultBackend`).
 * @throws MoeError E_ATTR if no generator is passed
 */
export function rand(
  shape: Shape,
  random: Random,
  options: { low?: number; high?: number; backend?: Backend } = {},
): Tensor {
  needRandom('rand', random)
  checkOptions('rand', options, { low: true, high: true, backend: true })
  const { low = 0, high = 1, backend } = options
  const values = random.uniform(sizeOf(shape))
  for (let i = 0; i < values.length; i++) values[i] = low + (high - low) * values[i]
  return fromHost(values, shape, 'f32', backend)
}
