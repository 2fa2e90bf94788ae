/** @file Persistent tensors: modules contain them, optimizers change them, checkpoints store them. */

import type { Backend } from './backend.ts'
import { needAlive, needTensor } from './checks.ts'
import { defaultBackend } from './default-backend.ts'
import type { DType, HostArray } from './dtype.ts'
import { MoeError } from './errors.ts'
import { checkOptions } from './options.ts'
import { keep } from './scope.ts'
import { type Shape, sameShape, showShape } from './shape.ts'
import { Tensor } from './tensor.ts'

/**
 * A low-rank adapter of a weight `[N, K]` (or `[E, N, K]`, one per expert): the effective weight is W + scale B A, with
 * B A of rank r ("LoRA", Hu et al. 2021). Products apply the two small matrices one after the other, so W can stay
 * frozen and quantized.
 */
export interface Adapter {
  /** A, `[r, K]` or `[E, r, K]`. */
  readonly down: Parameter
  /** B, `[N, r]` or `[E, N, r]`. */
  readonly up: Parameter
  /** α / r. */
  readonly scale: number
}

/** Reads the elements of rows `from` to `to - 1` of a parameter. A scalar has one row. */
export type RowReader = (from: number, to: number) => Promise<HostArray>

/**
 * A tensor that a module owns. It belongs to no scope, and `assign` replaces its elements. With `trainable: false` it
 * is a buffer: stored in checkpoints, but without gradients.
 */
export class Parameter extends Tensor {
  /** Sum of the gradients since the last `zeroGrad`, or null. */
  grad: Tensor | null = null
  /**
   * Number of times the elements were replaced or freed. What was computed or recorded from them is valid as long as
   * this number is unchanged. The memory may stay the same.
   */
  version = 0
  /**
   * The adapter that `addAdapters` added. `linear`, `groupedLinear` and `denseWeight` apply it; the parameter itself is
   * the weight without it.
   */
  adapter: Adapter | null = null
  /**
   * While the parameter has no memory: reads its elements from where they are, for example on another rank, or draws
   * initial ones (`deferWeights`). `stateDict` and `materialize` use it. Null if they are nowhere.
   */
  elsewhere: RowReader | null = null

  /**
   * Takes ownership of the memory of `initial`, which must not be used afterwards. `trainable` (default true)
   * determines whether it gets gradients.
   */
  constructor(initial: Tensor, options: { trainable?: boolean } = {}) {
    checkOptions('Parameter', options, { trainable: true })
    needTensor('Parameter', 'the initial value', initial)
    needAlive('Parameter', initial)
    super(initial.backend, initial.handle, initial.shape, initial.dtype)
    keep<Tensor>(this)
    initial.handle = null
    this.tracked = options.trainable !== false
  }

  /** Creates a parameter whose elements are elsewhere, or still to be assigned. @internal */
  static withoutMemory(
    shape: Shape,
    { dtype, backend = defaultBackend() }: { readonly dtype: DType; readonly backend?: Backend | undefined },
  ): Parameter {
    // No handle of a backend: it is replaced before anything can free it.
    const parameter = new Parameter(new Tensor(backend, {}, shape, dtype))
    parameter.handle = null
    return parameter
  }

  /** Whether it gets gradients. If false, it is a buffer. */
  get trainable(): boolean {
    return this.tracked
  }

  set trainable(value: boolean) {
    this.tracked = value
  }

  /**
   * Replaces the elements by those of `next` and takes ownership of its memory. `next` must not be used afterwards.
   * @throws MoeError E_SHAPE if shape, dtype or backend differ, E_DISPOSED if `next` was freed
   */
  assign(next: Tensor): void {
    needTensor('assign', 'the new value', next)
    needAlive('assign', next)
    // Methods such as `reshape` return the tensor itself if there is nothing to do.
    if (next === this) return
    needSimilar('assign', this, next)
    if (this.handle !== null) this.backend.free(this.handle)
    this.handle = next.handle
    next.handle = null
    this.elsewhere = null
    this.version++
  }

  /** Swaps memory with another parameter. @throws MoeError E_SHAPE if shape, dtype or backend differ */
  swap(other: Parameter): void {
    const { handle } = this
    needTensor('swap', 'the other parameter', other)
    needSimilar('swap', this, other)
    this.handle = other.handle
    other.handle = handle
    this.version++
    other.version++
  }

  /** Frees the gradient and sets `grad` to null. */
  zeroGrad(): void {
    this.grad?.dispose()
    this.grad = null
  }

  override get fixIfDisposed(): string {
    if (this.elsewhere !== null)
      return 'its weights are deferred: call await materialize(namedParameters(model)), or pass the model to ExpertParallel or Pipeline'
    return 'the parameter was freed with its model: create the model again, or dispose of it later; weights that another rank trains arrive with gather()'
  }

  /** Frees the elements, so that new ones to `assign` are not in memory beside them. The gradient stays. @internal */
  freeElements(): void {
    this.version++
    this.elsewhere = null
    super.dispose()
  }

  override dispose(): void {
    this.zeroGrad()
    this.freeElements()
  }
}

/** Checks that one tensor can replace the other. @throws MoeError E_SHAPE */
function needSimilar(op: string, own: Tensor, next: Tensor): void {
  const { backend, dtype, shape } = own
  let fix: string
  if (!sameShape(next.shape, shape)) fix = `pass a tensor of shape ${showShape(shape)}`
  else if (next.dtype !== dtype) fix = `cast it with .cast('${dtype}')`
  else if (next.backend !== backend) fix = 'copy it with await x.to(parameter.backend)'
  else return
  const another = next.backend !== backend && next.backend.name === backend.name ? 'another ' : ''
  throw new MoeError({
    code: 'E_SHAPE',
    op,
    problem: `the parameter is ${dtype} ${showShape(shape)} on ${backend.name}, but the other tensor is ${next.dtype} ${showShape(next.shape)} on ${another}${next.backend.name}`,
    fix,
    details: { expected: { dtype, shape }, found: { dtype: next.dtype, shape: next.shape } },
  })
}
