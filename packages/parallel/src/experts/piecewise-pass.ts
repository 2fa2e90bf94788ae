/** @file A forward and backward pass in synchronous pieces, with asynchronous exchanges between them. */
import {
  backwardInput,
  checkOptions,
  disposeAfterUse,
  Lifetime,
  MoeError,
  noGrad,
  type Precision,
  type Shape,
  type SplitBackward,
  sameShape,
  scope,
  showShape,
  type Tensor,
  withPrecision,
  zeros,
} from '@moe/core'
import type { TensorEach } from '../communicator/communicator.ts'
import { awaitedLater } from '../failure.ts'

/** A recorded step of the forward pass. `leaves` stand for `outputs` in later pieces. */
type Step =
  | {
      readonly kind: 'piece'
      readonly inputs: readonly Tensor[]
      readonly outputs: readonly Tensor[]
      readonly leaves: readonly Tensor[]
    }
  | {
      readonly kind: 'exchange'
      readonly input: Tensor
      readonly leaf: Tensor
      readonly backward: (gradient: Tensor) => Promise<Tensor>
    }

/**
 * A forward and backward pass that exchanges tensors with other ranks. Autograd is synchronous, but exchanges are not, so the pass is cut into pieces. Within a
 * piece, ops are recorded as usual. Between pieces and exchanges, tensors are detached leaves whose gradients the pass accumulates.
 *
 * In the backward pass, weight gradients are computed while an exchange is in progress, or later on demand.
 */
export class PiecewisePass {
  readonly #life = new Lifetime()
  readonly #precision: Precision
  readonly #backward: boolean
  readonly #steps: Step[] = []
  readonly #gradients = new Map<Tensor, Tensor>()
  #splits: SplitBackward[] = []

  /**
   * Creates an empty pass.
   * @param options.precision arithmetic of matrix products in pieces. Default: f32
   * @param options.backward false for a forward pass only, which records nothing and frees the intermediate results of each piece. Default: true
   */
  constructor(options: { readonly precision?: Precision; readonly backward?: boolean } = {}) {
    checkOptions('PiecewisePass', options, { precision: true, backward: true })
    this.#precision = options.precision ?? 'f32'
    this.#backward = options.backward ?? true
  }

  /** Returns a leaf for an outside tensor, to be passed to pieces. After `backward`, `gradient(leaf)` returns its gradient. */
  input(tensor: Tensor): Tensor {
    return this.#leafOf(tensor, this.#backward)
  }

  /** Runs a function that needs no gradient. Its tensors live as long as the pass. */
  run<T>(fn: () => T): T {
    return this.#life.run(fn)
  }

  /** Runs ops on leaves of this pass: inputs and results of pieces and exchanges. Returns leaves for the results. A leaf may be used in several pieces. */
  piece<const Inputs extends readonly Tensor[], const Outputs extends readonly Tensor[]>(
    inputs: Inputs,
    fn: (...inputs: Inputs) => Outputs,
  ): TensorEach<Outputs> {
    const run = () => withPrecision(this.#precision, () => fn(...inputs))
    if (!this.#backward) return this.#life.run(() => noGrad(() => scope(run))) as TensorEach<Outputs>
    const outputs = this.#life.run(run)
    const leaves = outputs.map(output => this.#leafOf(output, output.tracked))
    this.#steps.push({ kind: 'piece', inputs: inputs.filter(input => input.tracked), outputs, leaves })
    return leaves as TensorEach<Outputs>
  }

  /** Declares that no later piece or exchange reads these leaves. They are freed, unless the backward pass may read them. */
  release(...leaves: readonly Tensor[]): void {
    if (!this.#backward) for (const leaf of leaves) leaf.dispose()
  }

  /** The same for the result of a piece that no gradient rule reads. It is always freed. */
  discard(leaf: Tensor): void {
    leaf.dispose()
    for (const step of this.#steps.toReversed()) {
      if (step.kind !== 'piece' || !step.leaves.includes(leaf)) continue
      disposeAfterUse(step.outputs[step.leaves.indexOf(leaf)])
      return
    }
  }

  /**
   * Runs an asynchronous exchange between pieces; every rank takes part. Returns a leaf for the result. The pass owns the tensors that both functions
   * resolve to.
   * @param forward computes the result from the input
   * @param backward computes the gradient of the input from that of the result, which is zeros on a rank where nothing depends on the result
   */
  async exchange(
    input: Tensor,
    forward: (input: Tensor) => Promise<Tensor>,
    backward: (gradient: Tensor) => Promise<Tensor>,
  ): Promise<Tensor> {
    const result = await forward(input)
    const leaf = this.#leafOf(result, this.#backward)
    result.dispose()
    if (this.#backward) this.#steps.push({ kind: 'exchange', input, leaf, backward })
    return leaf
  }

  /**
   * Runs the backward pass from a leaf. Adds to `.grad` of the parameters; `gradient(input)` returns the gradients of inputs. Call it once.
   * @throws MoeError E_SHAPE if `gradient` has another shape than the leaf
   */
  async backward(from: Tensor, gradient: Tensor): Promise<void> {
    await this.backwardInput([from], [gradient])
    this.backwardWeight()
  }

  /**
   * Runs the part of the backward pass that computes the gradients of the inputs. `backwardWeight()` then computes the remaining weight gradients.
   * @param gradients one for each leaf
   * @param options.deferWeightGradients whether to defer all weight gradients to `backwardWeight()`. Default: false, they are computed while exchanges are in progress
   * @throws MoeError E_SHAPE if a gradient has another shape than its leaf
   */
  async backwardInput(
    from: readonly Tensor[],
    gradients: readonly Tensor[],
    options: { readonly deferWeightGradients?: boolean } = {},
  ): Promise<void> {
    checkOptions('PiecewisePass.backwardInput', options, { deferWeightGradients: true })
    for (const [i, { shape }] of from.entries()) checkShape(gradients[i].shape, shape)
    for (const [i, leaf] of from.entries()) this.#add(leaf, gradients[i].detach())
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop()) {
      if (step.kind === 'piece') this.#backThroughPiece(step)
      else {
        const { input, leaf, backward } = step
        const gradient = this.#take(leaf) ?? this.#life.run(() => zeros(leaf.shape, { backend: leaf.backend }))
        const exchanged = awaitedLater(backward(gradient))
        if (!options.deferWeightGradients && this.#splits.length > 0) {
          // Let the messages leave before computing.
          await new Promise(setImmediate)
          this.backwardWeight()
        }
        const received = await exchanged
        gradient.dispose()
        if (input.tracked) this.#add(input, received)
        else received.dispose()
      }
    }
  }

  /** Computes the deferred weight gradients. */
  backwardWeight(): void {
    for (const split of this.#splits) this.#life.run(() => split.backwardWeight())
    this.#splits = []
  }

  /** Returns the gradient of an input after `backward`; null if the result does not depend on it. It is freed with the pass. */
  gradient(input: Tensor): Tensor | null {
    return this.#gradients.get(input) ?? null
  }

  /** Frees all tensors of the pass. */
  dispose(): void {
    for (const split of this.#splits) split.dispose()
    for (const gradient of this.#gradients.values()) gradient.dispose()
    this.#gradients.clear()
    this.#life.dispose()
  }

  #leafOf(tensor: Tensor, tracked: boolean): Tensor {
    const leaf = this.#life.run(() => tensor.detach())
    leaf.tracked = tracked
    return leaf
  }

  #backThroughPiece({ inputs, outputs, leaves }: Extract<Step, { kind: 'piece' }>): void {
    const reached = outputs.flatMap((output, i) => {
      const gradient = this.#take(leaves[i])
      return gradient === null ? [] : [{ output, gradient }]
    })
    if (reached.length === 0) return
    const split = this.#life.run(() =>
      backwardInput(
        reached.map(({ output }) => output),
        inputs,
        reached.map(({ gradient }) => gradient),
      ),
    )
    this.#splits.push(split)
    for (const { gradient } of reached) gradient.dispose()
    for (const [i, gradient] of split.gradients.entries()) if (gradient !== null) this.#add(inputs[i], gradient)
  }

  #take(leaf: Tensor): Tensor | null {
    const gradient = this.#gradients.get(leaf) ?? null
    this.#gradients.delete(leaf)
    return gradient
  }

  /** Adds to the gradient of a leaf. Takes ownership of `gradient`. */
  #add(leaf: Tensor, gradient: Tensor): void {
    const before = this.#gradients.get(leaf)
    const sum = before === undefined ? gradient : this.#life.run(() => before.add(gradient))
    sum.owner = null
    this.#gradients.set(leaf, sum)
    if (before === undefined) return
    before.dispose()
    gradient.dispose()
  }
}

function checkShape(of: Shape, result: Shape): void {
  if (sameShape(of, result)) return
  throw new MoeError({
    code: 'E_SHAPE',
    op: 'backward',
    problem: `the gradient has shape ${showShape(of)}, but the result has shape ${showShape(result)}`,
    fix: 'pass a gradient of the same shape as the result',
  })
}
