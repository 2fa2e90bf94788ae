/** @file Tensors from nothing: from numbers of the host, of one value, of random numbers. */
import type { Backend, Shape, TensorSpec } from './backend.ts'
import { defaultBackend } from './context.ts'
import { type DType, encodeHost, type HostArray } from './dtype.ts'
import { describe } from './errors.ts'
import { attrError, needKnownDtype, needSizes, shapeError } from './infer.ts'
import { checkOptions, type OptionNames } from './options.ts'
import type { Random } from './random.ts'
import { showShape, sizeOf } from './shape.ts'
import { Tensor } from './tensor.ts'

/** Where and as what a new tensor is made. */
export interface CreateOptions {
  /** Default f32. */
  readonly dtype?: DType
  /** Default: that of `setDefaultBackend`. */
  readonly backend?: Backend
}

const createNames: OptionNames<CreateOptions> = { dtype: true, backend: true }

/** A tensor says both, too: `zeros(shape, x)`. */
function checkCreate(op: string, options: CreateOptions): void {
  if (!(options instanceof Tensor)) checkOptions(op, options, createNames)
}

/**
 * Every element the same value.
 * @throws MoeError E_SHAPE when a size is negative or no integer.
 */
export function full(shape: Shape, value: number, options: CreateOptions = {}): Tensor {
  checkCreate('full', options)
  const { dtype = 'f32', backend = defaultBackend() } = options
  needSizes('full', shape)
  needKnownDtype('full', dtype)
  const specs: TensorSpec[] = [{ shape, dtype }]
  return new Tensor(backend, backend.primitives.fill([], { value }, specs)[0], shape, dtype)
}

/** Every element 0. @throws MoeError E_SHAPE when a size is negative or no integer. */
export function zeros(shape: Shape, options?: CreateOptions): Tensor {
  return full(shape, 0, options)
}

/** Every element 1. @throws MoeError E_SHAPE when a size is negative or no integer. */
export function ones(shape: Shape, options?: CreateOptions): Tensor {
  return full(shape, 1, options)
}

/**
 * A tensor from numbers. The shape defaults to a vector; the dtype to i32 for an Int32Array, u8 for a Uint8Array, else f32.
 * Numbers are encoded to the dtype; pass raw bits of 16- and 8-bit floats to `fromHost` instead.
 * @throws MoeError E_SHAPE when the shape does not fit the number of values.
 */
export function tensor(values: ArrayLike<number>, shape?: Shape, options: CreateOptions = {}): Tensor {
  needNumbers(values)
  checkCreate('tensor', options)
  const natural = values instanceof Int32Array ? 'i32' : values instanceof Uint8Array ? 'u8' : 'f32'
  const dtype = options.dtype ?? natural
  needKnownDtype('tensor', dtype)
  return fromHost(encodeHost(dtype, values), shape ?? [values.length], dtype, options.backend)
}

/** Refuses what would silently become NaN. */
function needNumbers(values: ArrayLike<number> | undefined): void {
  const first: unknown = values?.[0]
  if (values?.length === 0 || typeof first === 'number' || typeof first === 'boolean') return
  const problem = first === undefined ? `the values are ${describe(values)}` : `value 0 is ${describe(first)}`
  throw attrError('tensor', problem, 'pass numbers in one array, and the shape: tensor([1, 2, 3, 4], [2, 2])')
}

/** A tensor from a host array that already holds the dtype's bits. The array is copied. */
export function fromHost(data: HostArray, shape: Shape, dtype: DType, backend = defaultBackend()): Tensor {
  needSizes('fromHost', shape)
  needKnownDtype('fromHost', dtype)
  if (sizeOf(shape) !== data.length) {
    throw shapeError('fromHost', `${data.length} values do not fill ${showShape(shape)} (${sizeOf(shape)})`)
  }
  return new Tensor(backend, backend.upload(data, shape, dtype), shape, dtype)
}

/** 0, 1, ..., n-1 as i32, on `backend` (default: that of `setDefaultBackend`). */
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
  throw attrError(op, `the generator is ${describe(random)}`, `pass one: ${op}(shape, new Random(seed))`)
}

/** A tensor of normal numbers of mean 0 and the given `deviation` (default 1), f32, on `backend` (default: that of `setDefaultBackend`). @throws MoeError E_ATTR without a generator */
export function randn(shape: Shape, random: Random, options: { deviation?: number; backend?: Backend } = {}): Tensor {
  needRandom('randn', random)
  checkOptions('randn', options, { deviation: true, backend: true })
  return fromHost(random.normal(sizeOf(shape), options.deviation), shape, 'f32', options.backend)
}

/** A tensor of uniform numbers in [`low`, `high`), by default [0, 1), f32, on `backend` (default: that of `setDefaultBackend`). @throws MoeError E_ATTR without a generator */
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
