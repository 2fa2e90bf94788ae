/**
 * @file The tensor, and `run`, the one place where ops are checked, dispatched and recorded.
 *
 * A tensor is immutable, contiguous and row-major. Most of its methods are one line that names a primitive and its
 * attributes.
 */
import type { SecondRun } from './autograd/checkpoint.ts'
import type {
  Backend,
  BinaryCode,
  CompareCode,
  FusedAttrs,
  FusedName,
  Handle,
  OpName,
  Precision,
  PrimitiveAttrs,
  PrimitiveName,
  Shape,
  TensorSpec,
  UnaryCode,
  Value,
} from './backend.ts'
import { checkBackend, checkPrecision, context, widePrecision } from './context.ts'
import { type DType, decodeHost, type HostArray, isFloat } from './dtype.ts'
import { describe, MoeError, shown } from './errors.ts'
import { attrError, infer, inferReshape, isSize, needDtype, needList, needSizes, shapeError } from './infer.ts'
import { inputName } from './input-names.ts'
import { needTensor } from './need-tensor.ts'
import { checkOptions } from './options.ts'
import { Scoped, scope } from './scope.ts'
import { normalizeAxis, sameShape, showShape, sizeOf } from './shape.ts'

/** A recorded op: what `backward` needs to propagate gradients from its outputs to its inputs. */
export interface TapeNode {
  /** Creation order: the nodes that made a node's inputs have smaller ids. */
  readonly id: number
  readonly op: OpName | 'checkpoint' | 'customGradient'
  inputs: readonly Tensor[]
  readonly attrs: unknown
  outputs: readonly Tensor[]
  /** During `backward`: the gradient of each output accumulated so far. */
  readonly outputGradients: Array<Tensor | null>
  /** The last backward walk that visited this node. */
  walk: number
  /** Definition with the gradient of a fused op; null for primitives, which are looked up by name. */
  readonly gradient: GradientSource | null
  /** For a checkpoint: the second run to differentiate. */
  readonly secondRun: SecondRun | null
}

/** The part of a fused op's definition that `backward` uses. */
export interface GradientSource {
  readonly vjp: Vjp<never> | null
  decompose(inputs: readonly Tensor[], attrs: never): Tensor[]
}

/** The arguments of a gradient rule. `needs(i)` returns whether the gradient of input i is wanted. */
export interface VjpContext<Attrs> {
  readonly inputs: readonly Tensor[]
  readonly outputs: readonly Tensor[]
  readonly attrs: Attrs
  needs(input: number): boolean
}

/**
 * Maps gradients of the outputs (null if there is none) to gradients of the inputs (null if there is none or it is not
 * wanted).
 */
export type Vjp<Attrs> = (
  context: VjpContext<Attrs>,
  gradients: ReadonlyArray<Tensor | null>,
) => ReadonlyArray<Tensor | null>

/** A fused op: its contract, its meaning in terms of primitives, and its gradient. */
export interface FusedDefinition<F extends FusedName> {
  readonly name: F
  /** Checks the inputs and returns the shapes and dtypes of the outputs. */
  infer(inputs: readonly Tensor[], attrs: FusedAttrs[F]): TensorSpec[]
  /** Computes the same result with other ops. */
  decompose(inputs: readonly Tensor[], attrs: FusedAttrs[F]): Tensor[]
  /** Gradient rule. If null, `backward` runs the decomposition again and differentiates it. */
  readonly vjp: Vjp<FusedAttrs[F]> | null
}

let nextNode = 0

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
  node: TapeNode | null
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
    alive('data', this)
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
    alive('detach', this)
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
      return total.mul(total.size === 0 ? 0 : total.size / this.size)
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
    return composed([this, other], () => matmul(this, other, options))
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
    return run('permute', [this], { axes })
  }
  /** Broadcasts to `shape`: repeats axes of size 1 and adds leading axes. */
  expand(shape: Shape): Tensor {
    if (sameShape(this.shape, shape)) return this
    needSizes('expand', shape)
    const lead = shape.length - this.rank
    if (lead < 0 || !this.shape.every((size, i) => size === 1 || size === shape[lead + i])) {
      const problem = `${showShape(this.shape)} does not broadcast to ${showShape(shape)}`
      throw shapeError('expand', problem, 'counting axes from the right, change only sizes of 1, or add leading axes')
    }
    return composed([this], () => {
      const grown = this.reshape([...new Array<number>(lead).fill(1), ...this.shape])
      return sameShape(grown.shape, shape) ? grown : runTo('expand', [grown], {}, shape)
    })
  }
  /** Takes `sizes[i]` elements from `starts[i]` on along every axis i. */
  slice(starts: readonly number[], sizes: readonly number[]): Tensor {
    needList('slice', 'starts', starts)
    needList('slice', 'sizes', sizes)
    const fits =
      starts.length === this.rank &&
      sizes.length === this.rank &&
      this.shape.every((size, i) => isSize(starts[i]) && isSize(sizes[i]) && starts[i] + sizes[i] <= size)
    if (!fits) {
      const problem = `starts ${shown(starts)} and sizes ${shown(sizes)} are out of range for ${showShape(this.shape)}`
      throw shapeError('slice', problem, 'pass a start and a size for each axis, with start + size at most its size')
    }
    return sameShape(sizes, this.shape) ? this : runTo('slice', [this], { starts }, sizes)
  }
  /** Takes elements `start` to `end - 1` of one axis. @throws MoeError E_SHAPE, E_ATTR */
  narrow(axis: number, start: number, end: number): Tensor {
    const at = normalizeAxis('narrow', axis, this.rank)
    if (!isSize(start) || !isSize(end) || start > end || end > this.shape[at]) {
      const problem = `start ${shown(start)} and end ${shown(end)} are out of range for axis ${axis} of ${showShape(this.shape)}`
      throw shapeError('narrow', problem, `pass 0 <= start <= end <= ${this.shape[at]}; the end is exclusive`)
    }
    const starts = new Array<number>(this.rank).fill(0)
    const sizes = this.shape.slice()
    starts[at] = start
    sizes[at] = end - start
    return this.slice(starts, sizes)
  }
  /** Adds `before[i]` elements in front of axis i and `after[i]` behind it, all equal to `value`. */
  pad(before: readonly number[], after: readonly number[], value = 0): Tensor {
    needList('pad', 'before', before)
    needList('pad', 'after', after)
    if (before.length !== this.rank || after.length !== this.rank || ![...before, ...after].every(isSize)) {
      const problem = `before ${shown(before)} and after ${shown(after)} do not fit ${showShape(this.shape)}`
      throw shapeError('pad', problem, 'pass a non-negative integer for each axis in both')
    }
    return runTo(
      'pad',
      [this],
      { before, value },
      this.shape.map((size, i) => size + before[i] + after[i]),
    )
  }
}

// --- dispatch ---

/** Checks that a tensor was not freed. Internal. @throws MoeError E_DISPOSED */
export function alive(op: string, tensor: Tensor): void {
  if (tensor.handle !== null) return
  throw new MoeError({
    code: 'E_DISPOSED',
    op,
    problem: `an input of shape ${showShape(tensor.shape)} was already freed`,
    fix: tensor.fixIfDisposed,
  })
}

/** @param code the name that the user called if the op covers several functions, for example `add` for `binary` */
function check(op: string, inputs: readonly Tensor[], code?: string): Backend {
  if (inputs.length === 0) throw shapeError(op, 'the list of tensors is empty', 'pass at least one')
  const backend = inputs[0]?.backend
  for (let i = 0; i < inputs.length; i++) {
    const input = inputs[i]
    if (input?.backend === undefined) needTensor(code ?? op, inputName(op, i), input)
    if (input.handle === null) alive(code ?? op, input)
    if (input.backend !== backend) {
      throw new MoeError({
        code: 'E_BACKEND_MIX',
        op: code ?? op,
        problem: `inputs are on different backends, ${backend.name} and ${input.backend.name}`,
        fix: 'copy one with await x.to(backend)',
      })
    }
  }
  return backend
}

function wrap(
  op: OpName,
  backend: Backend,
  inputs: readonly Tensor[],
  attrs: unknown,
  specs: readonly TensorSpec[],
  handles: readonly Handle[],
  gradient: GradientSource | null,
): Tensor[] {
  const outputs = new Array<Tensor>(specs.length)
  for (let i = 0; i < specs.length; i++) {
    outputs[i] = new Tensor(backend, handles[i], specs[i].shape, specs[i].dtype)
  }
  if (context.recording) record(op, inputs, attrs, outputs, gradient)
  return outputs
}

/** Records an op for `backward` if one of its inputs is tracked. Internal. */
export function record(
  op: OpName | 'checkpoint' | 'customGradient',
  inputs: readonly Tensor[],
  attrs: unknown,
  outputs: readonly Tensor[],
  gradient: GradientSource | null,
  secondRun: SecondRun | null = null,
): void {
  for (let i = 0; i < inputs.length; i++) {
    if (!inputs[i].tracked) continue
    const outputGradients = new Array<Tensor | null>(outputs.length).fill(null)
    const node: TapeNode = { id: nextNode++, op, inputs, attrs, outputs, outputGradients, walk: 0, gradient, secondRun }
    for (let j = 0; j < outputs.length; j++) {
      const output = outputs[j]
      output.node = node
      output.outputIndex = j
      output.tracked = isFloat(output.dtype)
    }
    if (op === 'reshape' && context.discardable?.has(inputs[0])) context.discardable.add(outputs[0])
    return
  }
}

/** Runs a primitive whose output shapes follow from its inputs. Returns all outputs. */
function runAll<P extends PrimitiveName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P]): Tensor[] {
  const backend = check(op, inputs, (attrs as { code?: string }).code)
  const specs = infer[op](inputs, attrs)
  const handles = backend.primitives[op](inputs, attrs, specs)
  return wrap(op, backend, inputs, attrs, specs, handles, null)
}

/**
 * Frees an intermediate result at once, recorded or not. Only for results that nothing reads after the op that was just
 * run: no gradient rule, and not the caller. Internal.
 */
export function disposeRecorded(tensor: Tensor): void {
  const { node } = tensor
  tensor.dispose()
  tensor.node = node
  tensor.temporary = true
}

/**
 * Like `disposeRecorded`, and also frees the tensors that this one is a reshape of. For results that one module gets
 * from another and reads only once.
 * @internal
 */
export function disposeAfterUse(tensor: Tensor): void {
  let last: Tensor | undefined = tensor
  while (last !== undefined) {
    const node: TapeNode | null = last.node
    disposeRecorded(last)
    last = node?.op === 'reshape' ? node.inputs[0] : undefined
  }
}

/** Runs a primitive with one output. */
export function run<P extends PrimitiveName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P]): Tensor {
  return runAll(op, inputs, attrs)[0]
}

/** Runs a primitive whose output shape is given. */
function runTo<P extends PrimitiveName>(
  op: P,
  inputs: readonly Tensor[],
  attrs: PrimitiveAttrs[P],
  shape: Shape,
): Tensor {
  const backend = check(op, inputs)
  const specs: TensorSpec[] = [{ shape, dtype: inputs[0].dtype }]
  const handles = backend.primitives[op](inputs, attrs, specs)
  return wrap(op, backend, inputs, attrs, specs, handles, null)[0]
}

/** Runs a fused op with the backend's kernel, or as its decomposition if the backend has none. */
export function runFused<F extends FusedName>(
  definition: FusedDefinition<F>,
  inputs: readonly Tensor[],
  attrs: FusedAttrs[F],
): Tensor[] {
  const { name } = definition
  const backend = check(name, inputs)
  const specs = definition.infer(inputs, attrs)
  const kernel = backend.fused[name]
  const handles = kernel?.(inputs, attrs, specs)
  if (handles !== undefined) return wrap(name, backend, inputs, attrs, specs, handles, definition as GradientSource)
  const key = `${backend.name}:${name}`
  context.fallbacks.set(key, (context.fallbacks.get(key) ?? 0) + 1)
  return composed(inputs, () => definition.decompose(inputs, attrs))
}

/** Frees the intermediate results of several ops at once. If they are recorded, `backward` frees them instead. */
function composed<T>(inputs: readonly Tensor[], fn: () => T): T {
  if (context.recording) {
    for (let i = 0; i < inputs.length; i++) if (inputs[i].tracked) return fn()
  }
  return scope(fn)
}

// --- primitives with broadcasting of numbers, defaults and folding ---

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
  if (x.dtype === 'i32' && !Number.isInteger(value)) {
    throw new MoeError({
      code: 'E_DTYPE',
      op: code,
      problem: `${value} would lose its fraction, because the tensor is i32`,
      fix: "cast the tensor with .cast('f32') first",
    })
  }
  const { backend, dtype } = x
  const scalar = new Tensor(backend, backend.primitives.fill([], { value }, [{ shape: [], dtype }])[0], [], dtype)
  const out = op(scalar)
  if (out.node === null) scalar.dispose()
  else scalar.temporary = true
  return out
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

const matmulNames = { transposeA: true, transposeB: true, precision: true }

function matmul(
  a: Tensor,
  b: Tensor,
  { transposeA = false, transposeB = false, precision = context.precision }: Parameters<Tensor['matmul']>[1] & object,
): Tensor {
  checkPrecision('matmul', precision)
  const attrs = { transposeA, transposeB, precision }
  if (a.rank < 2 || b.rank < 2) {
    throw shapeError(
      'matmul',
      `both sides need at least 2 axes, lhs ${showShape(a.shape)} rhs ${showShape(b.shape)}`,
      'reshape vectors first',
    )
  }
  if (a.rank === 2 && b.rank === 2) return run('matmul', [a, b], attrs)
  const lead = a.shape.slice(0, -2)
  if (b.rank === 2 && !transposeA) {
    const rows = sizeOf(a.shape.slice(0, -1))
    const out = run('matmul', [a.reshape([rows, a.shape[a.rank - 1]]), b], attrs)
    return out.reshape([...a.shape.slice(0, -1), out.shape[1]])
  }
  if (!sameShape(lead, b.shape.slice(0, -2))) {
    throw shapeError(
      'matmul',
      `leading axes differ, lhs ${showShape(a.shape)} rhs ${showShape(b.shape)}`,
      'expand one of them, or pass a rhs of rank 2',
      { lhs: a.shape, rhs: b.shape },
    )
  }
  const batch = sizeOf(lead)
  const fold = (x: Tensor) => x.reshape([batch, x.shape[x.rank - 2], x.shape[x.rank - 1]])
  const out = run('matmul', [fold(a), fold(b)], { ...attrs, precision: widePrecision(precision) })
  return out.reshape([...lead, out.shape[1], out.shape[2]])
}

/** `condition ? a : b`, elementwise with NumPy broadcasting; the condition is u8. @throws MoeError E_SHAPE, E_DTYPE */
export function where(condition: Tensor, a: Tensor, b: Tensor): Tensor {
  return run('where', [condition, a, b], {})
}

/** Concatenates tensors along an axis. @throws MoeError E_SHAPE, E_DTYPE */
export function concat(parts: readonly Tensor[], axis = 0): Tensor {
  if (!Array.isArray(parts))
    throw attrError('concat', `the parts are ${describe(parts)}, not an array`, 'pass an array of tensors: [a, b]')
  if (parts.length === 1) return parts[0]
  if (parts.length > 0) needTensor('concat', 'input 0', parts[0])
  return run('concat', parts, { axis: parts.length === 0 ? 0 : normalizeAxis('concat', axis, parts[0].rank) })
}

/**
 * Returns zeros `[rows, ...rest]` with every row of `source` added to the row given by `index`, in order. Rows out of
 * range are dropped.
 */
export function scatterAddRows(index: Tensor, source: Tensor, rows: number): Tensor {
  return run('scatterAddRows', [index, source], { rows })
}

const setRowsNames = { donate: true }

/**
 * Returns `x` with the rows at `index` replaced by those of `source`. `donate` gives up x, so that the result can reuse
 * its memory.
 */
export function setRows(x: Tensor, index: Tensor, source: Tensor, options: { donate?: boolean } = {}): Tensor {
  checkOptions('setRows', options, setRowsNames)
  const donate = options.donate === true && !(context.recording && (x.tracked || source.tracked))
  const out = run('setRows', [x, index, source], { donate })
  if (donate) x.dispose()
  return out
}
