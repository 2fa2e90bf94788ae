/** @file A pass in synchronous pieces with waits between them, forward and back. */
import {
  backwardInput,
  checkOptions,
  Lifetime,
  MoeError,
  type Precision,
  type Shape,
  type SplitBackward,
  sameShape,
  showShape,
  type Tensor,
  withPrecision,
  zeros,
} from '@moe/core'

/** What was done on the way forward. `made` is what later pieces see of `outputs`. */
type Step =
  | {
      readonly kind: 'piece'
      readonly inputs: readonly Tensor[]
      readonly outputs: readonly Tensor[]
      readonly made: readonly Tensor[]
    }
  | {
      readonly kind: 'exchange'
      readonly input: Tensor
      readonly made: Tensor
      readonly back: (gradient: Tensor) => Promise<Tensor>
    }

/**
 * Gradients go back through ops without waiting, but other ranks have to be waited for. So a pass is cut where they are: within a piece ops are recorded as
 * ever, and what goes from a piece to another (or to an exchange) is a leaf, of which the pass gathers the gradient.
 *
 * On the way back the gradients of weights are put off and computed while an exchange is under way, or when there is time.
 */
export class PiecewisePass {
  readonly #life = new Lifetime()
  readonly #precision: Precision
  readonly #steps: Step[] = []
  readonly #gradients = new Map<Tensor, Tensor>()
  #splits: SplitBackward[] = []

  /**
   * A pass without pieces.
   * @param options.precision arithmetic of matrix products in pieces. Default f32
   */
  constructor(options: { readonly precision?: Precision } = {}) {
    checkOptions('PiecewisePass', options, { precision: true })
    this.#precision = options.precision ?? 'f32'
  }

  /** A tensor from outside, as pieces take it; its gradient is `gradient(leaf)` after `backward`. */
  input(tensor: Tensor): Tensor {
    return this.#leafOf(tensor, true)
  }

  /** Runs a function whose tensors live as long as the pass, for what needs no gradient. */
  run<T>(fn: () => T): T {
    return this.#life.run(fn)
  }

  /** Ops on leaves of this pass (inputs, results of pieces and exchanges). A leaf may go to several pieces. */
  piece<const Inputs extends readonly Tensor[]>(
    inputs: Inputs,
    fn: (...inputs: Inputs) => readonly Tensor[],
  ): Tensor[] {
    const outputs = this.#life.run(() => withPrecision(this.#precision, () => fn(...inputs)))
    const made = outputs.map(output => this.#leafOf(output, output.tracked))
    this.#steps.push({ kind: 'piece', inputs: inputs.filter(input => input.tracked), outputs, made })
    return made
  }

  /**
   * Something to wait for between pieces, which every rank does. Both functions resolve to tensors that the pass takes over.
   * @param back from the gradient of the result to the gradient of the input; a rank without one has zeros
   */
  async exchange(
    input: Tensor,
    there: (input: Tensor) => Promise<Tensor>,
    back: (gradient: Tensor) => Promise<Tensor>,
  ): Promise<Tensor> {
    const result = await there(input)
    const made = this.#leafOf(result, true)
    result.dispose()
    this.#steps.push({ kind: 'exchange', input, made, back })
    return made
  }

  /**
   * Goes all the way back from a leaf: parameters gather their gradients, `gradient` tells those of inputs. Once.
   * @throws MoeError E_SHAPE when `gradient` has another shape
   */
  async backward(from: Tensor, gradient: Tensor): Promise<void> {
    await this.backwardInput([from], [gradient])
    this.weights()
  }

  /**
   * Goes back from leaves to the inputs, whose gradients `gradient` tells, before all weights have theirs: `weights` computes what is left.
   * @param gradients one of each leaf
   * @param options.putOff leaves all gradients of weights to `weights`. Default: they are computed while exchanges are under way.
   * @throws MoeError E_SHAPE when a gradient has another shape
   */
  async backwardInput(
    from: readonly Tensor[],
    gradients: readonly Tensor[],
    options: { readonly putOff?: boolean } = {},
  ): Promise<void> {
    checkOptions('PiecewisePass.backwardInput', options, { putOff: true })
    for (const [i, { shape }] of from.entries()) checkShape(gradients[i].shape, shape)
    for (const [i, leaf] of from.entries()) this.#add(leaf, gradients[i].detach())
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop()) {
      if (step.kind === 'piece') this.#backThroughPiece(step)
      else {
        const { input, made, back } = step
        const own = this.#take(made) ?? this.#life.run(() => zeros(made.shape, { backend: made.backend }))
        const coming = back(own)
        if (!options.putOff && this.#splits.length > 0) {
          // First what is to travel leaves.
          await new Promise(setImmediate)
          this.weights()
        }
        const came = await coming
        own.dispose()
        if (input.tracked) this.#add(input, came)
        else came.dispose()
      }
    }
  }

  /** Gives the weights those gradients that were put off. */
  weights(): void {
    for (const split of this.#splits) this.#life.run(() => split.weights())
    this.#splits = []
  }

  /** Gradient of an input, after `backward`; null where nothing came. It is freed with the pass. */
  gradient(input: Tensor): Tensor | null {
    return this.#gradients.get(input) ?? null
  }

  /** Frees all that was made. */
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

  #backThroughPiece({ inputs, outputs, made }: Extract<Step, { kind: 'piece' }>): void {
    const reached = outputs.flatMap((output, i) => {
      const gradient = this.#take(made[i])
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

  /** Takes the gradient over. */
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
    problem: `the gradient has shape ${showShape(of)}, the result ${showShape(result)}`,
    fix: 'give both the same shape',
  })
}
