/**
 * @file The tensor, and `run`, the one place where ops are checked, dispatched and recorded.
 *
 * A tensor is immutable, contiguous and row-major. Most of its methods are one line that names a primitive and its
 * attributes.
 */
import type { Backend, Handle, TensorSpec, Value } from './backend.ts'
import { checkInputs } from './check-inputs.ts'
import { checkBackend, needAlive, needDtype, needList, needTensor, shapeError } from './checks.ts'
import { type DType, decodeHost, type HostArray } from './dtype.ts'
import { MoeError } from './errors.ts'
import {
  foldMatmul,
  type GivenName,
  type InferredName,
  infer,
  inferExpand,
  inferNarrow,
  inferPad,
  inferReshape,
  inferSlice,
} from './infer.ts'
import type { BinaryCode, CompareCode, OpName, Precision, PrimitiveAttrs, UnaryCode } from './ops.ts'
import { checkOptions } from './options.ts'
import { checkPrecision, currentPrecision, widePrecision } from './precision.ts'
import { Scoped, scope } from './scope.ts'
import { normalizeAxis, type Shape, sameShape, showShape, sizeOf } from './shape.ts'
import { type GradientSource, isRecording, noteUse, record, type TapeNode } from './tape.ts'

const matmulNames = { transposeA: true, transposeB: true, precision: true }

/** An n-dimensional array on a backend. Create one with `tensor`, `zeros`, `randn` or an op. */
export class Tensor extends Scoped implements Value {
  /** The backend's buffer; null once it is freed. */
  handle: Handle
  /** Sizes of the axes, outermost first. */
  readonly shape: Shape
  /** Element type. Ops compute in f32 unless they say otherwise. */
  readonly dtype: DType
  /** Where the elements are stored. All inputs of an op must be on the same backend. */
  readonly backend: Backend
  /** The op that made it, while recorded. @internal */
  node: TapeNode<Tensor> | null
  /** Index among the outputs of that op. @internal */
  outputIndex: number
  /** Whether gradients flow to this tensor: a trainable parameter, or computed from one while recording. */
  tracked: boolean
  /** A number wrapped for one op and freed with it, or a recorded tensor that was freed on purpose. @internal */
  temporary: boolean

  /** Wraps a handle, which the tensor then owns. @internal */
  constructor(backend: Backend, handle: Handle, shape: Shape, dtype: DType) {
    super()
    this.backend = backend
    this.handle = handle
    this.shape = shape
    this.dtype = dtype
    this.node = null
    this.outputIndex = 0
    this.tracked = false
    this.temporary = false
  }

  /** Number of axes. */
  get rank(): number {
    return this.shape.length
  }

  /** Number of elements. */
  get size(): number {
    return sizeOf(this.shape)
  }

  /** Whether the device memory was freed. */
  get disposed(): boolean {
    return this.handle === null
  }

  /** Frees the device memory. Disposing twice is harmless; using the tensor afterwards throws E_DISPOSED. */
  dispose(): void {
    if (this.handle === null) return
    this.backend.free(this.handle)
    this.handle = null
    this.node = null
  }

  /** The fix to suggest when a freed tensor is used. @internal */
  get fixIfDisposed(): string {
    return 'return it from its scope, keep() it, or detach() it before backward'
  }

  /**
   * Returns a description such as `Tensor f32 [2,3]`, without reading the elements. Node prints it too; for the
   * elements, use `values`.
   */
  override toString(): string {
    return `${this.constructor.name} ${this.dtype} ${showShape(this.shape)}${this.disposed ? ' (freed)' : ''}`
  }

  [Symbol.for('nodejs.util.inspect.custom')](): string {
    return this.toString()
  }

  /** Returns the same description for JSON logs, instead of serializing the backend. */
  toJSON(): string {
    return this.toString()
  }

  /**
   * Returns the elements as a new host array, as raw bits for the 16- and 8-bit floats. Waits until they are computed.
   */
  async data(): Promise<HostArray> {
    needAlive('data', this)
    return this.backend.download(this)
  }

  /** Returns the elements as numbers, decoded from any dtype. */
  async values(): Promise<Float32Array | Int32Array | Uint8Array> {
    return decodeHost(this.dtype, await this.data())
  }

  /** Returns the value of a tensor with one element. @throws MoeError E_SHAPE if it has more or none */
  async item(): Promise<number> {
    if (this.size !== 1) {
      throw shapeError(
        'item',
        `${showShape(this.shape)} has ${this.size} elements, expected 1`,
        'reduce it first, or read all elements with values()',
      )
    }
    return (await this.values())[0]
  }

  /**
   * Returns a tensor with the same elements but without history: gradients stop here, and `backward` does not free it.
   * Shares memory.
   */
  detach(): Tensor {
    needAlive('detach', this)
    return new Tensor(this.backend, this.backend.primitives.reshape([this], {}, [this])[0], this.shape, this.dtype)
  }

  /** Copies the tensor to another backend, without history. */
  async to(backend: Backend): Promise<Tensor> {
    checkBackend('to', backend)
    const data = await this.data()
    return new Tensor(backend, backend.upload(data, this.shape, this.dtype), this.shape, this.dtype)
  }

  // --- elementwise ---

  /** -x. */
  neg(): Tensor {
    return unary('neg', this)
  }
  /** |x|; the gradient at 0 is 0. */
  abs(): Tensor {
    return unary('abs', this)
  }
  /** The sign of x: -1, 0 or 1. */
  sign(): Tensor {
    return unary('sign', this)
  }
  /** e^x. */
  exp(): Tensor {
    return unary('exp', this)
  }
  /** Natural logarithm: -Infinity at 0, NaN below. */
  log(): Tensor {
    return unary('log', this)
  }
  /** Square root; NaN below 0. */
  sqrt(): Tensor {
    return unary('sqrt', this)
  }
  /** 1 / sqrt(x); Infinity at 0. */
  rsqrt(): Tensor {
    return unary('rsqrt', this)
  }
  /** Sine of x in radians. */
  sin(): Tensor {
    return unary('sin', this)
  }
  /** Cosine of x in radians. */
  cos(): Tensor {
    return unary('cos', this)
  }
  /** Hyperbolic tangent. */
  tanh(): Tensor {
    return unary('tanh', this)
  }
  /** 1 / (1 + e^-x). */
  sigmoid(): Tensor {
    return unary('sigmoid', this)
  }
  /** The largest integer not above x. No gradient flows through it. */
  floor(): Tensor {
    return unary('floor', this)
  }
  /** x + other, with NumPy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  add(other: Tensor | number): Tensor {
    return binary('add', this, other)
  }
  /** x - other, with NumPy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  sub(other: Tensor | number): Tensor {
    return binary('sub', this, other)
  }
  /** x * other, with NumPy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  mul(other: Tensor | number): Tensor {
    return binary('mul', this, other)
  }
  /**
   * x / other, with NumPy broadcasting. i32 division truncates toward zero, and division by 0 gives 0.
   * @throws MoeError
   * E_SHAPE, E_DTYPE
   */
  div(other: Tensor | number): Tensor {
    return binary('div', this, other)
  }
  /** x^other, with NumPy broadcasting; f32 only. @throws MoeError E_SHAPE, E_DTYPE */
  pow(other: Tensor | number): Tensor {
    return binary('pow', this, other)
  }
  /** Elementwise maximum, with NumPy broadcasting; NaN if either side is NaN. @throws MoeError E_SHAPE, E_DTYPE */
  maximum(other: Tensor | number): Tensor {
    return binary('max', this, other)
  }
  /** Elementwise minimum, with NumPy broadcasting; NaN if either side is NaN. @throws MoeError E_SHAPE, E_DTYPE */
  minimum(other: Tensor | number): Tensor {
    return binary('min', this, other)
  }
  /** 1 where x equals other, else 0, as u8; with NumPy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  eq(other: Tensor | number): Tensor {
    return compare('eq', this, other)
  }
  /** 1 where x is less than other, else 0, as u8; with NumPy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  lt(other: Tensor | number): Tensor {
    return compare('lt', this, other)
  }
  /**
   * 1 where x is less than or equal to other, else 0, as u8; with NumPy broadcasting.
   * @throws MoeError E_SHAPE, E_DTYPE
   */
  le(other: Tensor | number): Tensor {
    return compare('le', this, other)
  }
  /**
   * Converts the elements to another dtype; for rounding, see `PrimitiveAttrs.cast`. No gradient flows through
   * integers.
   */
  cast(dtype: DType): Tensor {
    return dtype === this.dtype ? this : run('cast', [this], { dtype })
  }

  // --- reductions ---

  /**
   * Sum over the given axes (default: all); negative axes count from the end. `keepDims` keeps them with size 1.
   * @throws MoeError E_ATTR
   */
  sum(axes?: number | readonly number[], keepDims = false): Tensor {
    return reduce('sum', this, axes, keepDims)
  }
  /**
   * Maximum over the given axes (default: all); NaN if any element is NaN. Equal maxima share the gradient.
   * @throws
   * MoeError E_ATTR
   */
  max(axes?: number | readonly number[], keepDims = false): Tensor {
    return reduce('max', this, axes, keepDims)
  }
  /** Mean over the given axes (default: all), f32; 0 if there are no elements. @throws MoeError E_ATTR */
  mean(axes?: number | readonly number[], keepDims = false): Tensor {
    needDtype('mean', 'input', this, 'f32')
    return composed([this], () => {
      const total = reduce('sum', this, axes, keepDims)
      return total.mul(this.size === 0 ? 0 : total.size / this.size)
    })
  }
  /** Inclusive running sum along an axis; a negative axis counts from the end. @throws MoeError E_ATTR */
  cumsum(axis: number): Tensor {
    return run('cumsum', [this], { axis: normalizeAxis('cumsum', axis, this.rank) })
  }
  /**
   * The k largest elements of the last axis with their indices, in descending order; ties go to the lowest index.
   * @throws MoeError E_SHAPE
   */
  topk(k: number): { values: Tensor; indices: Tensor } {
    const [values, indices] = runAll('topk', [this], { k })
    return { values, indices }
  }

  // --- products ---

  /**
   * Matrix product. `[..., m, k] x [k, n]` folds the leading axes of the left side; if both sides have the same leading
   * axes, the product is batched. `transposeA` and `transposeB` swap the last two axes of that side. `precision`
   * defaults to that of `withPrecision`; batched products run in bf16 when it is fp8.
   * @throws MoeError E_SHAPE, E_DTYPE, E_ATTR
   */
  matmul(other: Tensor, options: { transposeA?: boolean; transposeB?: boolean; precision?: Precision } = {}): Tensor {
    needTensor('matmul', 'rhs', other)
    checkOptions('matmul', options, matmulNames)
    const { transposeA = false, transposeB = false, precision = currentPrecision() } = options
    checkPrecision('matmul', precision)
    if (this.rank === 2 && other.rank === 2) {
      return run('matmul', [this, other], { transposeA, transposeB, precision })
    }
    const { a, b, lead } = foldMatmul(this.shape, other.shape, transposeA)
    const attrs = { transposeA, transposeB, precision: b.length === 2 ? precision : widePrecision(precision) }
    return composed([this, other], () => {
      const out = run('matmul', [this.reshape(a), other.reshape(b)], attrs)
      return out.reshape([...lead, ...out.shape.slice(1)])
    })
  }

  // --- rows ---

  /**
   * Takes rows (entries of axis 0) at the given i32 indices. Returns `[...index.shape, ...this.shape[1:]]`; an index
   * out of range gives zeros.
   */
  takeRows(index: Tensor): Tensor {
    return run('takeRows', [this, index], {})
  }

  // --- movement ---

  /** Returns the same elements with another shape, without copying. One size may be -1, which infers it. */
  reshape(shape: Shape): Tensor {
    const target = inferReshape(this, shape)
    return sameShape(target, this.shape) ? this : runTo('reshape', [this], {}, target)
  }
  /** Reorders the axes: axis i of the result is axis `axes[i]` of this tensor. */
  permute(axes: readonly number[]): Tensor {
    needList('permute', 'axes', axes)
    return run('permute', [this], { axes: axes.slice() })
  }
  /** Broadcasts to `shape`: repeats axes of size 1 and adds leading axes. */
  expand(shape: Shape): Tensor {
    if (sameShape(this.shape, shape)) return this
    const grown = inferExpand(this, shape)
    return composed([this], () => {
      const x = this.reshape(grown)
      return sameShape(grown, shape) ? x : runTo('expand', [x], {}, shape.slice())
    })
  }
  /** Takes `sizes[i]` elements from `starts[i]` on along every axis i. */
  slice(starts: readonly number[], sizes: readonly number[]): Tensor {
    const target = inferSlice(this, starts, sizes)
    return sameShape(target, this.shape) ? this : runTo('slice', [this], { starts: starts.slice() }, target)
  }
  /** Takes elements `start` to `end - 1` of one axis. @throws MoeError E_SHAPE, E_ATTR */
  narrow(axis: number, start: number, end: number): Tensor {
    const { starts, sizes } = inferNarrow(this, axis, start, end)
    return this.slice(starts, sizes)
  }
  /** Adds `before[i]` elements in front of axis i and `after[i]` behind it, all equal to `value`. */
  pad(before: readonly number[], after: readonly number[], value = 0): Tensor {
    const target = inferPad(this, before, after)
    return runTo('pad', [this], { before: before.slice(), value }, target)
  }
}

// --- dispatch ---

/** Wraps the outputs of a kernel, and records the op if that is on. Internal. */
export function wrap(
  op: OpName,
  backend: Backend,
  inputs: readonly Tensor[],
  attrs: unknown,
  specs: readonly TensorSpec[],
  handles: readonly Handle[],
  gradient: GradientSource<Tensor> | null,
): Tensor[] {
  const outputs = new Array<Tensor>(specs.length)
  for (let i = 0; i < specs.length; i++) {
    outputs[i] = new Tensor(backend, handles[i], specs[i].shape, specs[i].dtype)
  }
  if (isRecording()) record(op, inputs, attrs, outputs, gradient)
  else noteUse(inputs)
  return outputs
}

/** Runs a primitive whose output shapes follow from its inputs. Returns all outputs. */
function runAll<P extends InferredName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P]): Tensor[] {
  const backend = checkInputs(op, inputs, (attrs as { code?: string }).code)
  const specs = infer[op](inputs, attrs)
  const handles = backend.primitives[op](inputs, attrs, specs)
  return wrap(op, backend, inputs, attrs, specs, handles, null)
}

/** Runs a primitive with one output, whose shape follows from its inputs. Internal. */
export function run<P extends InferredName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P]): Tensor {
  return runAll(op, inputs, attrs)[0]
}

/** Runs a primitive whose output shape is given. */
function runTo<P extends GivenName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P], shape: Shape): Tensor {
  const backend = checkInputs(op, inputs)
  const specs: TensorSpec[] = [{ shape, dtype: inputs[0].dtype }]
  const handles = backend.primitives[op](inputs, attrs, specs)
  return wrap(op, backend, inputs, attrs, specs, handles, null)[0]
}

/** Frees the intermediate results of several ops at once. If they are recorded, `backward` frees them instead. Internal. */
export function composed<T>(inputs: readonly Tensor[], fn: () => T): T {
  if (isRecording()) {
    for (let i = 0; i < inputs.length; i++) if (inputs[i].tracked) return fn()
  }
  return scope(fn)
}

// --- elementwise ops and reductions, with numbers and defaults ---

const unaryAttrs = Object.fromEntries(
  ['neg', 'abs', 'sign', 'exp', 'log', 'sqrt', 'rsqrt', 'sin', 'cos', 'tanh', 'sigmoid', 'floor'].map(code => [
    code,
    { code },
  ]),
) as { [C in UnaryCode]: { code: C } }
const binaryAttrs = Object.fromEntries(
  ['add', 'sub', 'mul', 'div', 'max', 'min', 'pow'].map(code => [code, { code }]),
) as { [C in BinaryCode]: { code: C } }

function unary(code: UnaryCode, x: Tensor): Tensor {
  return run('unary', [x], unaryAttrs[code])
}

/**
 * Turns a number beside a tensor into a scalar of the tensor's dtype and backend, which lives as long as the op needs
 * it.
 */
function withNumber(code: string, x: Tensor, value: number, op: (scalar: Tensor) => Tensor): Tensor {
  if (x.dtype === 'i32' && (value | 0) !== value) {
    const loss = Number.isInteger(value) ? 'overflow' : 'lose its fraction'
    throw new MoeError({
      code: 'E_DTYPE',
      op: code,
      problem: `${value} would ${loss}, because the tensor is i32`,
      fix: "cast the tensor with .cast('f32') first",
    })
  }
  const { backend, dtype } = x
  const scalar = new Tensor(backend, backend.primitives.fill([], { value }, [{ shape: [], dtype }])[0], [], dtype)
  try {
    const out = op(scalar)
    scalar.temporary = out.node !== null
    return out
  } finally {
    if (!scalar.temporary) scalar.dispose()
  }
}

function binary(code: BinaryCode, a: Tensor, b: Tensor | number): Tensor {
  if (typeof b === 'number') return withNumber(code, a, b, scalar => run('binary', [a, scalar], binaryAttrs[code]))
  needTensor(code, 'rhs', b)
  return run('binary', [a, b], binaryAttrs[code])
}

function compare(code: CompareCode, a: Tensor, b: Tensor | number): Tensor {
  if (typeof b === 'number') return withNumber(code, a, b, scalar => run('compare', [a, scalar], { code }))
  needTensor(code, 'rhs', b)
  return run('compare', [a, b], { code })
}

function reduce(
  code: 'sum' | 'max',
  x: Tensor,
  axes: number | readonly number[] | undefined,
  keepDims: boolean,
): Tensor {
  if (axes !== undefined && typeof axes !== 'number') needList(code, 'axes', axes)
  const list = axes === undefined ? x.shape.map((_, i) => i) : typeof axes === 'number' ? [axes] : axes
  const normal = [...new Set(list.map(axis => normalizeAxis(code, axis, x.rank)))].sort((a, b) => a - b)
  if (normal.length === 0) return x
  const kept = run('reduce', [x], { code, axes: normal })
  if (keepDims) return kept
  const out = kept.reshape(x.shape.filter((_, i) => !normal.includes(i)))
  if (out !== kept && out.node === null) kept.dispose()
  return out
}
