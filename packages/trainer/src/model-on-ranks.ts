/** @file A model that lies on several ranks, each training a part of it: what the trainer asks of it, and its steps. */
import {
  full,
  isMoeError,
  MoeError,
  namedAdapters,
  namedParameters,
  namedStreams,
  type OwnParameter,
  type Precision,
  type Shape,
  scope,
} from '@moe/core'
import type { TokenBatch, TrainableModel } from './model.ts'
import { findNonFinite, stepError } from './non-finite.ts'
import { clipScale } from './optim/clip.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { gatherValues, type Ranks } from './ranks.ts'
import type { StepNumbers, Steps } from './step-numbers.ts'

/**
 * A model of which every rank trains a part, in place of the same model on each: a `Pipeline` or an `ExpertParallel` of `@moe/parallel` is one. All ranks make the same calls in the same order.
 */
export interface ModelOnRanks {
  /** All ranks of the training, and messages between two of them. */
  readonly ranks: Ranks & Required<Pick<Ranks, 'send' | 'receive'>>
  /** What this rank trains. Of the model's own parameters, those that it lacks are freed. */
  readonly parameters: readonly OwnParameter[]
  /** The rows of every step that this rank is given, as `TrainingOrder` has it: ranks with the same number have the same micro-batches. */
  readonly dataShare: { readonly rank: number; readonly world: number }
  /** Micro-batches that a step must have. Undefined for any number. */
  readonly microBatches?: number
  /**
   * Forward and backward passes of a step, which leave its gradients in `parameters`. It is the step of one rank with the micro-batches of all. The weights of this rank are taken from the model where it has them:
   * after `gather`, or when a checkpoint was loaded. `precision` is the arithmetic of matrix products, f32 by default.
   * @returns numbers of the whole model, the same on every rank; `nll` among the metrics is the next-token negative log-likelihood per counted position
   * @throws MoeError E_NAN on all ranks (details: `loss`, `gradNorm`), when one of these is not finite
   */
  step(
    batches: readonly TokenBatch[],
    options: { readonly precision?: Precision },
  ): Promise<{
    readonly loss: number
    /** Over all gradients of all ranks. */
    readonly gradNorm: number
    readonly metrics: Readonly<Record<string, number>>
  }>
  /** Has each rank keep the optimizer's state of a share of what several have alike: `parameters` change. Called before an optimizer is made. */
  shareOptimizer?(): void
  /** Gives the model on every rank all weights, until the next step. */
  gather(): Promise<void>
  /** Takes what this rank trains back from the model, which `gather` or a checkpoint has given all weights, and frees what it lacks. `parameters` may be changed then; `gather` gives them to all. */
  release(): void
}

/** @throws MoeError E_CONFIG when it was made of another model, or of one that draws */
export function checkOnRanks({ parameters }: ModelOnRanks, model: TrainableModel): void {
  const whole = new Map(namedParameters(model).map(({ name, parameter }) => [name, parameter]))
  const fits = ({ name, parameter, firstRow }: OwnParameter) => {
    const of = whole.get(name)
    return firstRow === undefined ? of === parameter : of !== undefined && isRows(parameter.shape, of.shape)
  }
  const refuse = (problem: string, fix: string) => {
    throw new MoeError({ code: 'E_CONFIG', op: 'train', problem, fix })
  }
  if (namedAdapters(model).length > 0) {
    refuse(
      'the model has adapters, which ranks with a part of it each do not train',
      'pass the communicator itself as ranks',
    )
  }
  const other = parameters.find(own => !fits(own))
  if (other !== undefined) {
    const fix = 'make the Pipeline or ExpertParallel of the model that is trained'
    refuse(`ranks train ${other.name}, which is no parameter of the model`, fix)
  }
  // How far on a layer's stream is, only the rank that computes the layer knows: nothing gathers that.
  for (const { name } of namedStreams(model)) {
    const fix = 'train the whole model on every rank: pass the communicator itself as ranks'
    refuse(`${name} is drawn from in training, and a model in parts cannot keep where it is`, fix)
  }
}

const isRows = ([, ...own]: Shape, [, ...whole]: Shape) => own.join() === whole.join()

/** Steps that all ranks take together: the passes are the model's, each rank updates its part. */
export class StepsOnRanks implements Steps {
  readonly #model: TrainableModel
  readonly #onRanks: ModelOnRanks
  readonly #optimizer: Optimizer
  readonly #options: { readonly clip: number; readonly precision: Precision }

  constructor(
    model: TrainableModel,
    onRanks: ModelOnRanks,
    optimizer: Optimizer,
    options: { readonly clip: number; readonly precision: Precision },
  ) {
    this.#model = model
    this.#onRanks = onRanks
    this.#optimizer = optimizer
    this.#options = options
  }

  async step(
    batches: readonly TokenBatch[],
    { lr, step }: { lr: number; step: number },
  ): Promise<Omit<StepNumbers, 'count'>> {
    const { ranks } = this.#onRanks
    try {
      const { loss, gradNorm, metrics } = await this.#passes(batches, step)
      this.#update(lr, gradNorm)
      const after = (await this.#model.afterStep?.(counts => ranks.allReduce(counts))) ?? {}
      const { nll = loss, ...others } = metrics
      return { loss, nll, gradNorm, metrics: others, after }
    } finally {
      this.#zeroGradients()
    }
  }

  prepare(): void {}

  dispose(): void {}

  async #passes(batches: readonly TokenBatch[], step: number): ReturnType<ModelOnRanks['step']> {
    const { parameters, ranks } = this.#onRanks
    try {
      return await this.#onRanks.step(batches, { precision: this.#options.precision })
    } catch (error) {
      if (!isMoeError(error, 'E_NAN')) throw error
      // All ranks are here, and tell the same.
      const found = await gatherValues(ranks, await findNonFinite(parameters), parameters[0].parameter)
      const first = found.find(where => where?.kind === 'value') ?? found.find(where => where !== null) ?? null
      throw stepError(first, step, error.details as { loss: number; gradNorm: number })
    }
  }

  #update(lr: number, gradNorm: number): void {
    const { backend } = this.#onRanks.parameters[0].parameter
    scope(() => this.#optimizer.step(lr, clipScale(full([], gradNorm, { backend }), this.#options.clip)))
    this.#zeroGradients()
  }

  #zeroGradients(): void {
    for (const { parameter } of this.#onRanks.parameters) parameter.zeroGrad()
  }
}
