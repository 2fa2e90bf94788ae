/**
 * @file The tensor, and `run`: the one place where an op is checked, dispatched and recorded.
 *
 * A tensor is immutable, contiguous and row-major. Its methods are one line each: they name a primitive and its attributes.
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
import { checkPrecision, context, widePrecision } from './context.ts'
import { type DType, decodeHost, type HostArray, isFloat } from './dtype.ts'
import { describe, MoeError } from './errors.ts'
import { attrError, infer, inferReshape, isSize, needSizes, shapeError } from './infer.ts'
import { needTensor } from './need-tensor.ts'
import { checkOptions } from './options.ts'
import { Scoped, scope } from './scope.ts'
import { broadcastShapes, normalizeAxis, sameShape, showShape, sizeOf } from './shape.ts'

/** A recorded op: what `backward` needs to send gradients from its outputs to its inputs. */
export interface TapeNode {
  /** Creation order; a node's inputs were made by nodes with smaller ids. */
  readonly id: number
  readonly op: OpName | 'checkpoint' | 'customGradient'
  inputs: readonly Tensor[]
  readonly attrs: unknown
  outputs: readonly Tensor[]
  /** During `backward`: what has arrived for each output so far. */
  readonly flowing: Array<Tensor | null>
  /** The last walk that came by. */
  walk: number
  /** Where fused ops find their gradient; primitives are looked up by name. */
  readonly gradient: GradientSource | null
  /** Of a checkpoint, which has none of its own: what is gone back through. */
  readonly again: SecondRun | null
}

/** The part of a fused op's definition that `backward` uses. */
export interface GradientSource {
  readonly vjp: Vjp<never> | null
  decompose(inputs: readonly Tensor[], attrs: never): Tensor[]
}

/** What a gradient rule sees. `needs(i)` tells whether the gradient of input i is wanted. */
export interface VjpContext<Attrs> {
  readonly inputs: readonly Tensor[]
  readonly outputs: readonly Tensor[]
  readonly attrs: Attrs
  needs(input: number): boolean
}

/** From gradients of the outputs (null where none flows) to gradients of the inputs (null where none exists or none is wanted). */
export type Vjp<Attrs> = (
  context: VjpContext<Attrs>,
  gradients: ReadonlyArray<Tensor | null>,
) => ReadonlyArray<Tensor | null>

/** A fused op: its contract, its meaning in primitives, and its gradient. */
export interface FusedDefinition<F extends FusedName> {
  readonly name: F
  /** Checks the inputs and tells the outputs. */
  infer(inputs: readonly Tensor[], attrs: FusedAttrs[F]): TensorSpec[]
  /** The same result from primitives. */
  decompose(inputs: readonly Tensor[], attrs: FusedAttrs[F]): Tensor[]
  /** Gradient rule; null runs the decomposition again and goes back through it. */
  readonly vjp: Vjp<FusedAttrs[F]> | null
}

let nextNode = 0

/** An n-dimensional array on a backend. Make one with `tensor`, `zeros`, `randn` or an op. */
export class Tensor extends Scoped implements Value {
  /** The backend's buffer; null once it is freed. */
  handle: Handle
  /** Sizes of the axes, outermost first. */
  readonly shape: Shape
  /** Element type. Ops compute in f32, except those that say otherwise. */
  readonly dtype: DType
  /** Where the elements are. Ops take tensors of one backend. */
  readonly backend: Backend
  /** The op that made it, while it is recorded. @internal */
  node: TapeNode | null
  /** Which output of that op it is. @internal */
  outputIndex: number
  /** Whether gradients flow to it: a trainable parameter, or made from one while recording. */
  tracked: boolean
  /** A number that was wrapped for one op and is freed with it, or something that was freed although it is recorded. @internal */
  temporary: boolean

  /** Wraps a handle that the tensor then owns. @internal */
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

  /** Frees the device memory. Doing it twice is harmless; using the tensor afterwards throws E_DISPOSED. */
  dispose(): void {
    if (this.handle === null) return
    this.backend.free(this.handle)
    this.handle = null
    this.node = null
  }

  /** What to do where it is used after that. @internal */
  get whenFreed(): string {
    return 'return it from its scope, keep() it, or detach() it before backward'
  }

  /** `Tensor f32 [2,3]`, which Node prints, too. The elements may still be in the making: see `values`. */
  override toString(): string {
    return `${this.constructor.name} ${this.dtype} ${showShape(this.shape)}${this.disposed ? ' (freed)' : ''}`
  }

  [Symbol.for('nodejs.util.inspect.custom')](): string {
    return this.toString()
  }

  /** What a line of a log in JSON says of a tensor: the same, and not the backend with all that it holds. */
  toJSON(): string {
    return this.toString()
  }

  /** The elements as a fresh host array (raw bits for the 16- and 8-bit floats). Waits for the work that makes them. */
  async data(): Promise<HostArray> {
    alive('data', this)
    return this.backend.download(this)
  }

  /** The elements as numbers, decoded from any dtype. */
  async values(): Promise<Float32Array | Int32Array | Uint8Array> {
    return decodeHost(this.dtype, await this.data())
  }

  /** The value of a tensor with one element. */
  async item(): Promise<number> {
    if (this.size !== 1) {
      throw shapeError(
        'item',
        `${showShape(this.shape)} has ${this.size} elements, needs 1`,
        'reduce it first, or use values()',
      )
    }
    return (await this.values())[0]
  }

  /** The same elements without history: gradients stop here, and `backward` does not free it. */
  detach(): Tensor {
    alive('detach', this)
    return new Tensor(this.backend, this.backend.primitives.reshape([this], {}, [this])[0], this.shape, this.dtype)
  }

  /** A copy on another backend, without history. */
  async to(backend: Backend): Promise<Tensor> {
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
  /** -1, 0 or 1. */
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
  /** Square root, NaN below 0. */
  sqrt(): Tensor {
    return unary('sqrt', this)
  }
  /** 1 / sqrt(x), Infinity at 0. */
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
  /** The greatest integer that is not above x. No gradient flows through it. */
  floor(): Tensor {
    return unary('floor', this)
  }
  /** x + other, with numpy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  add(other: Tensor | number): Tensor {
    return binary('add', this, other)
  }
  /** x - other, with numpy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  sub(other: Tensor | number): Tensor {
    return binary('sub', this, other)
  }
  /** x * other, with numpy broadcasting. @throws MoeError E_SHAPE, E_DTYPE */
  mul(other: Tensor | number): Tensor {
    return binary('mul', this, other)
  }
  /** x / other, with numpy broadcasting; i32 truncates toward zero, and by 0 gives 0. @throws MoeError E_SHAPE, E_DTYPE */
  div(other: Tensor | number): Tensor {
    return binary('div', this, other)
  }
  /** x^other, with numpy broadcasting. f32 only. @throws MoeError E_SHAPE, E_DTYPE */
  pow(other: Tensor | number): Tensor {
    return binary('pow', this, other)
  }
  /** Elementwise maximum; NaN wins. */
  maximum(other: Tensor | number): Tensor {
    return binary('max', this, other)
  }
  /** Elementwise minimum; NaN wins. */
  minimum(other: Tensor | number): Tensor {
    return binary('min', this, other)
  }
  /** 1 where equal, else 0 (u8). */
  eq(other: Tensor | number): Tensor {
    return compare('eq', this, other)
  }
  /** 1 where less than other, else 0 (u8). */
  lt(other: Tensor | number): Tensor {
    return compare('lt', this, other)
  }
  /** 1 where less than other or equal, else 0 (u8). */
  le(other: Tensor | number): Tensor {
    return compare('le', this, other)
  }
  /** Converts the elements; see `PrimitiveAttrs.cast` for rounding. Only f32 carries gradients. */
  cast(dtype: DType): Tensor {
    return dtype === this.dtype ? this : run('cast', [this], { dtype })
  }

  // --- reductions ---

  /** Sum over the given axes (default all); negative ones count from the end. `keepDims` leaves them with size 1. @throws MoeError E_ATTR */
  sum(axes?: number | readonly number[], keepDims = false): Tensor {
    return reduce('sum', this, axes, keepDims)
  }
  /** Largest over the given axes (default all), NaN if there is one. The gradient is shared by equal ones. @throws MoeError E_ATTR */
  max(axes?: number | readonly number[], keepDims = false): Tensor {
    return reduce('max', this, axes, keepDims)
  }
  /** Mean over the given axes (default all); of nothing it is 0. f32. @throws MoeError E_ATTR */
  mean(axes?: number | readonly number[], keepDims = false): Tensor {
    return composed([this], () => {
      const total = reduce('sum', this, axes, keepDims)
      return total.mul(total.size === 0 ? 0 : total.size / this.size)
    })
  }
  /** Running sum along an axis, itself included; a negative one counts from the end. @throws MoeError E_ATTR */
  cumsum(axis: number): Tensor {
    return run('cumsum', [this], { axis: normalizeAxis('cumsum', axis, this.rank) })
  }
  /** The k largest of the last axis, descending, ties to the lowest index. */
  topk(k: number): { values: Tensor; indices: Tensor } {
    const [values, indices] = runAll('topk', [this], { k })
    return { values, indices }
  }

  // --- products ---

  /**
   * Matrix product. `[..., m, k] x [k, n]` folds the leading axes; equal leading axes multiply batchwise.
   * transposeA and transposeB read the last two axes of that side swapped. `precision` is by default that of `withPrecision`;
   * batches are multiplied in bf16 where fp8 is asked for.
   * @throws MoeError E_SHAPE, E_DTYPE, E_ATTR
   */
  matmul(other: Tensor, options: { transposeA?: boolean; transposeB?: boolean; precision?: Precision } = {}): Tensor {
    needTensor('matmul', 'rhs', other)
    checkOptions('matmul', options, matmulNames)
    return composed([this, other], () => matmul(this, other, options))
  }

  // --- rows ---

  /** Rows (of axis 0) at the given i32 indices: `[...index.shape, ...this.shape[1:]]`. */
  takeRows(index: Tensor): Tensor {
    return run('takeRows', [this, index], {})
  }

  // --- movement ---

  /** One size may be -1. Free of copies. */
  reshape(shape: Shape): Tensor {
    const target = inferReshape(this, shape)
    return sameShape(target, this.shape) ? this : runTo('reshape', [this], {}, target)
  }
  /** Axis i of the result is axis `axes[i]` of this. */
  permute(axes: readonly number[]): Tensor {
    return run('permute', [this], { axes })
  }
  /** Repeats axes of size 1 (and adds leading ones) to reach `shape`. */
  expand(shape: Shape): Tensor {
    if (sameShape(this.shape, shape)) return this
    needSizes('expand', shape)
    if (shape.length < this.rank || !sameShape(broadcastShapes('expand', this.shape, shape), shape)) {
      throw shapeError('expand', `${showShape(this.shape)} does not expand to ${showShape(shape)}`)
    }
    return composed([this], () => {
      const grown = this.reshape([...new Array<number>(shape.length - this.rank).fill(1), ...this.shape])
      return sameShape(grown.shape, shape) ? grown : runTo('expand', [grown], {}, shape)
    })
  }
  /** `sizes[i]` elements from `starts[i]` of every axis. */
  slice(starts: readonly number[], sizes: readonly number[]): Tensor {
    const fits =
      starts.length === this.rank &&
      sizes.length === this.rank &&
      this.shape.every((size, i) => isSize(starts[i]) && isSize(sizes[i]) && starts[i] + sizes[i] <= size)
    if (!fits) {
      throw shapeError('slice', `from [${starts}] of size [${sizes}] does not lie inside ${showShape(this.shape)}`)
    }
    return sameShape(sizes, this.shape) ? this : runTo('slice', [this], { starts }, sizes)
  }
  /** Elements start .. end-1 of one axis. */
  narrow(axis: number, start: number, end: number): Tensor {
    const at = normalizeAxis('narrow', axis, this.rank)
    const starts = new Array<number>(this.rank).fill(0)
    const sizes = this.shape.slice()
    starts[at] = start
    sizes[at] = end - start
    return this.slice(starts, sizes)
  }
  /** Adds `before[i]` and `after[i]` elements of `value` around axis i. */
  pad(before: readonly number[], after: readonly number[], value = 0): Tensor {
    if (before.length !== this.rank || after.length !== this.rank || ![...before, ...after].every(isSize)) {
      throw shapeError('pad', `before [${before}] and after [${after}] do not fit ${showShape(this.shape)}`)
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

function alive(op: string, tensor: Tensor): void {
  if (tensor.handle !== null) return
  throw new MoeError({
    code: 'E_DISPOSED',
    op,
    problem: `an input ${showShape(tensor.shape)} was already freed`,
    fix: tensor.whenFreed,
  })
}

/** @param code what the user called, where the op computes several functions: `add` of `binary` */
function check(op: string, inputs: readonly Tensor[], code?: string): Backend {
  if (inputs.length === 0) throw shapeError(op, 'there are no tensors', 'pass at least one')
  const backend = inputs[0]?.backend
  for (let i = 0; i < inputs.length; i++) {
    const input = inputs[i]
    if (input?.backend === undefined) needTensor(op, `input ${i}`, input)
    if (input.handle === null) alive(code ?? op, input)
    if (input.backend !== backend) {
      throw new MoeError({
        code: 'E_BACKEND_MIX',
        op: code ?? op,
        problem: `inputs live on ${backend.name} and ${input.backend.name}`,
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

/** Internal: remembers an op for `backward` if one of its inputs is tracked. */
export function record(
  op: OpName | 'checkpoint' | 'customGradient',
  inputs: readonly Tensor[],
  attrs: unknown,
  outputs: readonly Tensor[],
  gradient: GradientSource | null,
  again: SecondRun | null = null,
): void {
  for (let i = 0; i < inputs.length; i++) {
    if (!inputs[i].tracked) continue
    const flowing = new Array<Tensor | null>(outputs.length).fill(null)
    const node: TapeNode = { id: nextNode++, op, inputs, attrs, outputs, flowing, walk: 0, gradient, again }
    for (let j = 0; j < outputs.length; j++) {
      const output = outputs[j]
      output.node = node
      output.outputIndex = j
      output.tracked = isFloat(output.dtype)
    }
    if (op === 'reshape' && context.lent?.has(inputs[0])) context.lent.add(outputs[0])
    return
  }
}

/** Runs a primitive whose output shapes follow from its inputs; returns all outputs. */
function runAll<P extends PrimitiveName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P]): Tensor[] {
  const backend = check(op, inputs, (attrs as { code?: string }).code)
  const specs = infer[op](inputs, attrs)
  const handles = backend.primitives[op](inputs, attrs, specs)
  return wrap(op, backend, inputs, attrs, specs, handles, null)
}

/**
 * Internal: frees the numbers of an intermediate result at once, recorded or not. For those that nothing but the op which was just run reads: no gradient rule, nor
 * the caller.
 */
export function spend(tensor: Tensor): void {
  const { node } = tensor
  tensor.dispose()
  tensor.node = node
  tensor.temporary = true
}

/**
 * `spend`, for what the tensor is a reshape of as well: a result that modules have of each other, and read once.
 * @internal
 */
export function usedUp(tensor: Tensor): void {
  let last: Tensor | undefined = tensor
  while (last !== undefined) {
    const node: TapeNode | null = last.node
    spend(last)
    last = node?.op === 'reshape' ? node.inputs[0] : undefined
  }
}

/** Runs a primitive with one output. */
export function run<P extends PrimitiveName>(op: P, inputs: readonly Tensor[], attrs: PrimitiveAttrs[P]): Tensor {
  return runAll(op, inputs, attrs)[0]
}

/** Runs a primitive that is told its output shape. */
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

/** Runs a fused op with the backend's kernel, or as its decomposition where there is none. */
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

/** Frees the intermediate results of several ops at once, unless they are recorded: then `backward` frees them. */
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

/** A number beside a tensor becomes a scalar of the tensor's dtype and backend, which lives as long as the op needs it. */
function withNumber(x: Tensor, value: number, op: (scalar: Tensor) => Tensor): Tensor {
  if (x.dtype === 'i32' && !Number.isInteger(value)) {
    throw new MoeError({
      code: 'E_DTYPE',
      op: 'number',
      problem: `${value} beside a tensor of i32 would lose its fraction`,
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
  if (typeof b === 'number') return withNumber(a, b, scalar => run('binary', [a, scalar], binaryAttrs[code]))
  needTensor(code, 'rhs', b)
  return run('binary', [a, b], binaryAttrs[code])
}

function compare(code: CompareCode, a: Tensor, b: Tensor | number): Tensor {
  if (typeof b === 'number') return withNumber(a, b, scalar => run('compare', [a, scalar], { code }))
  needTensor(code, 'rhs', b)
  return run('compare', [a, b], { code })
}

function reduce(
  code: 'sum' | 'max',
  x: Tensor,
  axes: number | readonly number[] | undefined,
  keepDims: boolean,
): Tensor {
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
      `needs matrices, lhs ${showShape(a.shape)} rhs ${showShape(b.shape)}`,
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

/** `condition ? a : b`, elementwise with broadcasting; the condition is u8. */
export function where(condition: Tensor, a: Tensor, b: Tensor): Tensor {
  return run('where', [condition, a, b], {})
}

/** Joins tensors along an axis. */
export function concat(parts: readonly Tensor[], axis = 0): Tensor {
  if (!Array.isArray(parts)) throw attrError('concat', `the parts are ${describe(parts)}, no array`, 'pass [a, b]')
  if (parts.length === 1) return parts[0]
  if (parts.length > 0) needTensor('concat', 'input 0', parts[0])
  return run('concat', parts, { axis: parts.length === 0 ? 0 : normalizeAxis('concat', axis, parts[0].rank) })
}

/** Zeros `[rows, ...rest]` plus every row of `source` added to row `index`, in order. */
export function scatterAddRows(index: Tensor, source: Tensor, rows: number): Tensor {
  return run('scatterAddRows', [index, source], { rows })
}

const setRowsNames = { donate: true }

/** `x` with the rows at `index` replaced by those of `source`. With `donate`, x is used up (its memory may become the result's). */
export function setRows(x: Tensor, index: Tensor, source: Tensor, options: { donate?: boolean } = {}): Tensor {
  checkOptions('setRows', options, setRowsNames)
  const donate = options.donate === true && !(context.recording && (x.tracked || source.tracked))
  const out = run('setRows', [x, index, source], { donate })
  if (donate) x.dispose()
  return out
}
