/** @file A model whose parts are trained by different ranks: its interface, and its training steps. */
import {
  full,
  isMoeError,
  type LocalParameter,
  MoeError,
  namedAdapters,
  namedParameters,
  namedStreams,
  noGrad,
  type Parameter,
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
 * A model that is distributed over ranks, each of which trains a part of it: a `Pipeline` or an `ExpertParallel` of
 * `@moe/parallel`. All ranks must make the same calls in the same order.
 */
export interface ModelOnRanks {
  /** All ranks of the training, with point-to-point messages. */
  readonly ranks: Ranks & Required<Pick<Ranks, 'send' | 'receive'>>
  /** The parameters that this rank trains. Parameters of the model that this rank does not need are freed. */
  readonly parameters: readonly LocalParameter[]
  /**
   * All parameters whose weights this rank holds, which may be more than it trains. The ranks together hold all weights
   * of the model.
   */
  readonly weights: readonly LocalParameter[]
  /**
   * This rank's share of every step's rows, as in `TrainingOrder`. Ranks with equal numbers get the same micro-batches.
   */
  readonly dataShard: { readonly rank: number; readonly world: number }
  /** Required number of micro-batches per step. Default: any number. */
  readonly microBatches?: number
  /**
   * Runs the forward and backward passes of a step and leaves the gradients in `parameters`. The result equals the step
   * of a single rank with the micro-batches of all ranks. If the model contains all weights (after `gather`), this rank
   * takes its weights from there.
   *
   * @param options.precision precision of matrix products, f32 by default
   * @returns numbers for the complete model, the same on every rank. `metrics.nll` is the next-token negative
   *   log-likelihood per counted position
   * @throws MoeError E_NAN on all ranks if the loss or gradient norm is not finite (details: `loss`, `gradNorm`)
   */
  step(
    batches: readonly TokenBatch[],
    options: { readonly precision?: Precision },
  ): Promise<{
    readonly loss: number
    /** Norm over all gradients of all ranks. */
    readonly gradNorm: number
    readonly metrics: Readonly<Record<string, number>>
  }>
  /**
   * Shards the optimizer state of parameters that several ranks replicate. Changes `parameters`. Called before the
   * optimizer is created.
   */
  shardOptimizer?(): void
  /**
   * Runs forward passes without gradients. All ranks make the same number of calls with the same number of
   * micro-batches, at most `microBatches`; ranks with equal `dataShard` pass the same ones.
   *
   * @param options.precision precision of matrix products, f32 by default
   * @returns for each micro-batch, the negative log-likelihood in nats, summed over `count` positions; null if another
   *   rank returns it
   */
  evaluate(
    batches: ReadonlyArray<{ readonly batch: TokenBatch; readonly from: number }>,
    options: { readonly precision?: Precision },
  ): Promise<ReadonlyArray<{ readonly nll: number; readonly count: number } | null>>
  /**
   * Like `evaluate`, but returns the negative log-likelihood of every position, `[rows * positions]`, and all ranks have
   * micro-batches of their own. Needed to learn from rewards and preferences.
   *
   * @param options.precision precision of matrix products, f32 by default
   */
  nlls?(batches: readonly TokenBatch[], options: { readonly precision?: Precision }): Promise<readonly Float32Array[]>
  /**
   * Runs `work` on the first rank of each group of consecutive ranks that together hold the model, with the inference of
   * the model available; resolves to undefined on the other ranks. Needed to learn from rewards.
   */
  lead?<T>(work: () => Promise<T>): Promise<T | undefined>
  /** The `lookahead` of the model. Needed for a reference model. */
  readonly lookahead?: number
  /** Makes `weights` current: receives what other ranks have updated. `step` and `evaluate` do it, too. */
  synchronize(): Promise<void>
  /**
   * Prepares `parameters` to be changed outside of a step; `synchronize` sends the changes to the other ranks. If the
   * model contains all weights, takes this rank's from there and frees the rest.
   */
  release(): void
}

/** @throws MoeError E_CONFIG if it was created from another model, or the model has adapters or draws random numbers */
export function checkOnRanks({ parameters }: ModelOnRanks, model: TrainableModel): void {
  const whole = new Map(namedParameters(model).map(({ name, parameter }) => [name, parameter]))
  const fits = ({ name, parameter, firstRow }: LocalParameter) => {
    const of = whole.get(name)
    return firstRow === undefined ? of === parameter : of !== undefined && isRows(parameter.shape, of.shape)
  }
  const refuse = (problem: string, fix: string) => {
    throw new MoeError({ code: 'E_CONFIG', op: 'train', problem, fix })
  }
  if (namedAdapters(model).length > 0) {
    refuse(
      'the model has adapters, which pipeline and expert parallelism do not support',
      'use data parallelism: pass the communicator as ranks',
    )
  }
  const other = parameters.find(own => !fits(own))
  if (other !== undefined) {
    const fix = 'create the Pipeline or ExpertParallel from the model that you train'
    refuse(`ranks train ${other.name}, which is not a parameter of the model`, fix)
  }
  // Only the rank that computes a layer knows the position of the layer's random stream, and nothing gathers it.
  for (const { name } of namedStreams(model)) {
    const fix = 'use data parallelism: pass the communicator as ranks'
    refuse(`the model draws random numbers from ${name}, which pipeline and expert parallelism do not support`, fix)
  }
}

const isRows = ([, ...own]: Shape, [, ...whole]: Shape) => own.join() === whole.join()

/** Steps of a distributed model: the model runs the passes, and each rank updates its parameters. */
export class StepsOnRanks implements Steps {
  readonly #model: TrainableModel
  readonly #onRanks: ModelOnRanks
  readonly #optimizer: Optimizer
  readonly #options: { readonly clip: number; readonly precision: Precision }
  /** A parameter on the backend of the model. This rank's own parameters may be none, if there are many ranks. */
  readonly #like: Parameter

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
    this.#like = namedParameters(model)[0].parameter
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
      // All ranks throw this error, so all can gather the cause.
      const found = await gatherValues(ranks, await findNonFinite(parameters), this.#like)
      const first = found.find(where => where?.kind === 'value') ?? found.find(where => where !== null) ?? null
      throw stepError(first, step, error.details as { loss: number; gradNorm: number })
    }
  }

  #update(lr: number, gradNorm: number): void {
    const { backend } = this.#like
    scope(() => noGrad(() => this.#optimizer.step(lr, clipScale(full([], gradNorm, { backend }), this.#options.clip))))
    this.#zeroGradients()
  }

  #zeroGradients(): void {
    for (const { parameter } of this.#onRanks.parameters) parameter.zeroGrad()
  }
}
