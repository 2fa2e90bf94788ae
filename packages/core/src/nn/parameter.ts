/** @file Tensors that persist: what modules hold, optimizers change and checkpoints store. */
import { MoeError } from '../errors.ts'
import { checkOptions } from '../options.ts'
import { keep } from '../scope.ts'
import { sameShape, showShape } from '../shape.ts'
import { Tensor } from '../tensor.ts'

/**
 * What stands beside a weight `[N, K]` (or `[E, N, K]`, one per expert): with it the weight is W + scale B A, of rank r ("LoRA", Hu et al. 2021). Products take the two
 * small matrices one after the other, so that W may be frozen, and stored in fewer bits.
 */
export interface Adapter {
  /** A `[r, K]` or `[E, r, K]`. */
  readonly down: Parameter
  /** B `[N, r]` or `[E, N, r]`. */
  readonly up: Parameter
  /** α / r. */
  readonly scale: number
}

/**
 * A tensor that a module holds. Its elements can be replaced by `assign`; it belongs to no scope. With `trainable: false` it is a buffer: stored
 * in checkpoints, never given a gradient.
 */
export class Parameter extends Tensor {
  /** Sum of the gradients since the last `zeroGrad`, or null. */
  grad: Tensor | null = null
  /** How often the elements were replaced or freed: what was computed from them, or recorded over them, holds as long as this does. The memory may be the same as before. */
  version = 0
  /** What `addAdapters` put beside it. `linear`, `groupedLinear` and `denseWeight` heed it; the parameter itself is the weight without it. */
  adapter: Adapter | null = null

  /** Takes over the tensor's memory; the tensor is used up. `trainable` (default true): whether it is given gradients. */
  constructor(initial: Tensor, options: { trainable?: boolean } = {}) {
    checkOptions('Parameter', options, { trainable: true })
    super(initial.backend, initial.handle, initial.shape, initial.dtype)
    keep<Tensor>(this)
    initial.handle = null
    this.tracked = options.trainable !== false
  }

  /** Whether it is given gradients. False: a buffer. */
  get trainable(): boolean {
    return this.tracked
  }

  set trainable(value: boolean) {
    this.tracked = value
  }

  /** Takes over the memory of `next` in place of its own; `next` is used up. */
  assign(next: Tensor): void {
    if (!sameShape(next.shape, this.shape) || next.dtype !== this.dtype || next.backend !== this.backend)
      throw unlike('assign', this, next)
    if (this.handle !== null) this.backend.free(this.handle)
    this.handle = next.handle
    next.handle = null
    this.version++
  }

  /** Exchanges the memory with another parameter's. */
  exchange(other: Parameter): void {
    const { handle } = this
    if (!sameShape(other.shape, this.shape) || other.dtype !== this.dtype || other.backend !== this.backend)
      throw unlike('exchange', this, other)
    this.handle = other.handle
    other.handle = handle
    this.version++
    other.version++
  }

  /** Frees the gradient; `grad` is null. */
  zeroGrad(): void {
    this.grad?.dispose()
    this.grad = null
  }

  override get whenFreed(): string {
    return 'it is a parameter, freed with its model: make or open the model again, or dispose of it later; one that another rank trains comes with gather()'
  }

  override dispose(): void {
    this.version++
    this.zeroGrad()
    super.dispose()
  }
}

const unlike = (op: string, own: Tensor, next: Tensor) =>
  new MoeError({
    code: 'E_SHAPE',
    op,
    problem: `a parameter ${own.dtype} ${showShape(own.shape)} on ${own.backend.name} cannot take ${next.dtype} ${showShape(next.shape)} on ${next.backend.name}`,
  })
