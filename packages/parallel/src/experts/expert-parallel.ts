/** @file Expert parallelism: training steps of a model whose routed experts are sharded over ranks. */
import {
  type Backend,
  checkOptions,
  fromHost,
  full,
  type LocalParameter,
  type Module,
  materialize,
  namedParameters,
  type Precision,
  type Tensor,
} from '@moe/core'
import { checkBatches, checkRanks, configError } from '../check-call.ts'
import type { Communicator } from '../communicator/communicator.ts'
import {
  type EvaluatedBatch,
  type EvaluatedLoss,
  finite,
  gradientNorm,
  type ParallelStepOptions,
  type ParallelStepResult,
} from '../gradients.ts'
import { Replicated } from '../replicated.ts'
import {
  type ExpertParallelLayer,
  ExpertShards,
  expertRanks,
  type PieceRunner,
  type RouteTokens,
} from './expert-shards.ts'
import { LedExperts } from './led-experts.ts'
import { PiecewisePass } from './piecewise-pass.ts'

/** A model that supports expert parallelism, such as `DeepSeek` of `@moe/deepseek`. `Batch` is the type of its micro-batches. */
export interface ExpertParallelModel<Batch> extends Module {
  /** The layers with routed experts. */
  readonly moeLayers: readonly ExpertParallelLayer[]
  /**
   * Prepares the forward pass of a micro-batch in pieces. `forward` returns the loss, a mean over the `count` positions that carry loss; `route` sends tokens
   * to the experts of a layer, which may be on other ranks. `nll`, the sum of the negative log-likelihoods, is needed for evaluations, and `nlls`, those of the positions, for rewards and
   * preferences.
   * @param options.training false for an evaluation
   * @param options.from positions before this one carry no loss
   */
  inPieces(
    batch: Batch,
    options?: { training?: boolean; from?: number },
  ): {
    readonly count: number
    forward(
      pass: PieceRunner,
      route: RouteTokens,
    ): Promise<{
      readonly loss: Tensor
      readonly nll?: Tensor
      readonly nlls?: Tensor
      readonly metrics?: Readonly<Record<string, Tensor>>
    }>
  }
  /** The number of tokens that the rows of a micro-batch have beyond its positions. Needed for a reference model of rewards and preferences. */
  readonly lookahead?: number
  /** If set, how inference (such as `generate`) reaches experts on other ranks. `ExpertParallel.lead` sets it; needed only for that. */
  remoteExperts?: RemoteExperts | null
}

/** Runs forward passes whose routed experts are on other ranks. */
export interface RemoteExperts {
  /** Runs a pass without gradients. Frees its tensors afterwards, except those that `fn` has passed to `keep`. */
  infer<T>(precision: Precision, fn: (pass: PieceRunner, route: RouteTokens) => Promise<T>): Promise<T>
}

/**
 * Expert parallelism: each rank trains a shard of the routed experts of every layer on the tokens of all ranks. All other parameters are replicated and trained
 * as in data parallelism, on each rank's own rows. Of n ranks that share the E experts of a layer, rank r holds the experts from r E/n to (r + 1) E/n, exclusive.
 *
 * Create the model on every rank with the same weights, within `deferWeights` if they do not fit. The constructor copies this rank's experts and frees the model's, until `gather` restores all.
 *
 * If `expertParallelSize` is less than the number of ranks, consecutive ranks form groups of that size. Each group holds all experts, and gradients of experts
 * are summed over the groups.
 *
 * Pass it to `train` of `@moe/trainer` as `ranks`.
 */
export class ExpertParallel<Batch> {
  /**
   * The parameters of this rank; create its optimizer from them. Experts keep their names in the model and hold rows of the model's stacked parameters
   * from `firstRow` on.
   */
  parameters: readonly LocalParameter[]
  /** All parameters whose weights this rank holds: `parameters`, and those that other ranks update for it after `shardOptimizer`. */
  readonly weights: readonly LocalParameter[]
  /**
   * The weights that this rank needs for `lead`: on the first of the ranks that share the experts `weights`, on the others only their experts. Pass them to
   * `loadWeights` to open a checkpoint for inference.
   */
  readonly leadWeights: readonly LocalParameter[]
  /** All ranks of the training. */
  readonly ranks: Communicator
  /** The number of tokens that rows have beyond their positions, as in the model. */
  readonly lookahead: number
  /** This rank's share of the rows of a step, for `TrainingOrder` of `@moe/trainer`. */
  readonly dataShard: { readonly rank: number; readonly world: number }
  readonly #model: ExpertParallelModel<Batch>
  readonly #backend: Backend
  readonly #shards: ExpertShards
  readonly #replicated: Replicated
  /** Whether the other ranks compute experts for this one, and so take part in nothing else. */
  #leading = false

  /**
   * @param options.expertParallelSize the number of ranks that share the experts. Default: all.
   * @throws MoeError E_CONFIG if it does not divide the number of ranks and the number of experts
   */
  constructor(
    model: ExpertParallelModel<Batch>,
    ranks: Communicator,
    options: { readonly expertParallelSize?: number } = {},
  ) {
    const op = 'ExpertParallel'
    checkOptions(op, options, { expertParallelSize: true })
    if (typeof model?.inPieces !== 'function')
      throw configError(
        op,
        'the model has no inPieces()',
        'pass a DeepSeek, or a model that implements ExpertParallelModel',
      )
    checkRanks(op, ranks)
    this.#model = model
    this.ranks = ranks
    this.lookahead = model.lookahead ?? 0
    this.dataShard = { rank: ranks.rank, world: ranks.size }
    const { expertParallelSize = ranks.size } = options
    this.#shards = new ExpertShards(op, new Map(model.moeLayers.entries()), expertRanks(op, ranks, expertParallelSize))
    this.weights = namedParameters(model).map(named => this.#shards.own(named))
    this.parameters = this.weights
    const leads = this.#shards.sharing.rank === 0
    this.leadWeights = leads ? this.weights : this.weights.filter(({ firstRow }) => firstRow !== undefined)
    this.#backend = this.parameters[0].parameter.backend
    this.#replicated = new Replicated([
      { parameters: this.parameters.filter(({ firstRow }) => firstRow === undefined), ranks },
      {
        parameters: this.parameters.filter(({ firstRow }) => firstRow !== undefined),
        ranks: withSameExperts(ranks, expertParallelSize),
      },
    ])
  }

  /**
   * Opens a checkpoint for inference with `lead`, on each rank only the weights that it needs.
   * @param open opens a model with some of its weights, such as `parameters => DeepSeek.fromPretrained(folder, { parameters })`
   * @param options.expertParallelSize as of the constructor
   * @throws MoeError like the constructor
   */
  static async open<Model extends ExpertParallelModel<never>>(
    open: (parameters: (model: ExpertParallelModel<never>) => readonly LocalParameter[]) => Promise<Model>,
    ranks: Communicator,
    options: { readonly expertParallelSize?: number } = {},
  ): Promise<{ readonly model: Model; readonly spread: ExpertParallel<Parameters<Model['inPieces']>[0]> }> {
    let spread: ExpertParallel<never> | undefined
    const model = await open(model => {
      spread = new ExpertParallel(model, ranks, options)
      return spread.leadWeights
    })
    if (spread !== undefined) return { model, spread }
    throw configError('ExpertParallel.open', 'the function has not called `parameters`', 'pass it to fromPretrained')
  }

  /**
   * Shards the optimizer state of replicated parameters (ZeRO-1): each rank updates its shard for all ranks, and updated weights are exchanged at the
   * start of the next step and by `gather`. Afterwards `parameters` are those that this rank updates. Call it on all ranks before you create the optimizer;
   * `train` does.
   */
  shardOptimizer(): void {
    this.parameters = this.#replicated.shard()
  }

  /**
   * Runs the forward and backward passes of a step and replaces the gradients of `parameters`. Clip them by `gradNorm` and call the optimizer afterwards.
   * Micro-batches are weighted by their number of positions that carry loss, so that the step equals that of one rank with the micro-batches of all.
   * @param batches this rank's micro-batches, the same number on every rank
   * @throws MoeError E_CONFIG if the ranks have different numbers of micro-batches, or none, or if all parameters are frozen; E_NAN if the loss or the gradient norm is
   * not finite. All ranks throw.
   */
  async step(batches: readonly Batch[], options: ParallelStepOptions = {}): Promise<ParallelStepResult> {
    checkOptions('ExpertParallel.step', options, { precision: true })
    checkBatches('ExpertParallel', batches)
    // Not `parameters`: with many ranks, the shard of this one may be empty.
    if (!namedParameters(this.#model).some(({ parameter }) => parameter.trainable))
      throw configError('ExpertParallel', 'all parameters are frozen', 'set trainable on the parameters to train')
    const { precision } = options
    await this.synchronize()
    this.#replicated.zeroGradients()
    const backend = this.#backend
    const passes = batches.map(batch => this.#model.inPieces(batch))
    const positions = await this.#positions(passes.map(({ count }) => count))
    const sums: Record<string, number> = {}
    for (const part of passes) {
      const weight = part.count / Math.max(1, positions)
      const pass = new PiecewisePass({ precision })
      try {
        const { loss, metrics = {} } = await part.forward(pass, this.#shards.routeIn(pass))
        await pass.backward(
          loss,
          pass.run(() => full([], weight, { backend })),
        )
        for (const [name, value] of Object.entries({ loss, ...metrics }))
          sums[name] = (sums[name] ?? 0) + weight * (await value.item())
      } finally {
        pass.dispose()
      }
    }
    this.#shards.completeGradients()
    await this.#replicated.sumGradients()
    const gradNorm = await gradientNorm(this.ranks, this.#replicated.counted(), backend)
    const [loss, ...metrics] = await this.#sum(Object.values(sums))
    const names = Object.keys(sums).slice(1)
    const result = { loss, gradNorm, metrics: Object.fromEntries(names.map((name, i) => [name, metrics[i]])) }
    return finite('ExpertParallel', result)
  }

  /**
   * Runs forward passes without gradients, for an evaluation. All ranks call it with the same number of micro-batches, each with its own.
   * @returns the loss of each micro-batch
   * @throws MoeError E_CONFIG if the model does not return `nll`
   */
  async evaluate(
    batches: ReadonlyArray<EvaluatedBatch<Batch>>,
    options: ParallelStepOptions = {},
  ): Promise<EvaluatedLoss[]> {
    checkOptions('ExpertParallel.evaluate', options, { precision: true })
    return this.#passes('evaluate', batches, options, async ({ nll }, count) => nll && { nll: await nll.item(), count })
  }

  /**
   * Runs forward passes without gradients and returns the negative log-likelihood of every position, in nats. All ranks call it with the same number of micro-batches, each with its own.
   * @returns `[rows * positions]` for each micro-batch
   * @throws MoeError E_CONFIG if the model does not return `nlls`
   */
  async nlls(batches: readonly Batch[], options: ParallelStepOptions = {}): Promise<Float32Array[]> {
    checkOptions('ExpertParallel.nlls', options, { precision: true })
    const all = batches.map(batch => ({ batch, from: 0 }))
    return this.#passes('nlls', all, options, async ({ nlls }) => nlls && ((await nlls.values()) as Float32Array))
  }

  /** Runs forward passes without gradients. @param read returns the result of a pass; undefined if the model does not return what it reads */
  async #passes<T>(
    name: 'evaluate' | 'nlls',
    batches: ReadonlyArray<EvaluatedBatch<Batch>>,
    { precision }: ParallelStepOptions,
    read: (found: { readonly nll?: Tensor; readonly nlls?: Tensor }, count: number) => Promise<T | undefined>,
  ): Promise<T[]> {
    await this.synchronize()
    const results: T[] = []
    for (const { batch, from } of batches) {
      const part = this.#model.inPieces(batch, { training: false, from })
      const pass = new PiecewisePass({ precision, backward: false })
      try {
        const result = await read(await part.forward(pass, this.#shards.routeIn(pass)), part.count)
        if (result === undefined) {
          const missing = name === 'nlls' ? 'nlls' : 'nll'
          const fix = `return { loss, ${missing} } from inPieces()`
          throw configError(`ExpertParallel.${name}`, `the model returns no ${missing}`, fix)
        }
        results.push(result)
      } finally {
        pass.dispose()
      }
    }
    return results
  }

  /**
   * Uses the model for inference without gathering it. On the first of the ranks that share the experts, runs `work`, in which all of the model's inference is
   * available: `generate`, `session`, `continuousBatch`, `score`, and what uses them, such as a server. Meanwhile the other ranks compute their experts for it.
   * All ranks call it, and it resolves on all when `work` has ended. Until then, nothing else that all ranks do together is available. If an exchange between the ranks fails, it rejects at once,
   * and the process should end.
   *
   * The other ranks need no weights but their experts: deferred ones stay without memory.
   * @returns the result of `work`; undefined on the other ranks
   * @throws MoeError E_CONFIG if the model does not support it, or within `work`
   */
  async lead<T>(work: () => Promise<T>): Promise<T | undefined> {
    const model = this.#model
    if (!('remoteExperts' in model))
      throw configError(
        'ExpertParallel.lead',
        'the model has no property remoteExperts',
        'pass a DeepSeek to ExpertParallel, or call gather() and use the whole model',
      )
    this.#checkNotLeading()
    const led = new LedExperts(this.#shards, this.#backend)
    await this.#replicated.gather()
    this.#shards.takeOwn()
    await materialize(this.leadWeights)
    if (this.#shards.sharing.rank > 0) {
      await led.follow()
      return undefined
    }
    // What was computed with experts of other ranks, such as cached prompts, may be outdated.
    for (const whole of this.#shards.rows.keys()) whole.version++
    this.#leading = true
    model.remoteExperts = {
      async infer(precision, fn) {
        const pass = new PiecewisePass({ precision, backward: false })
        try {
          return await fn(pass, led.routeIn(pass, precision))
        } finally {
          pass.dispose()
        }
      },
    }
    try {
      return await Promise.race([work(), led.failure.promise])
    } finally {
      this.#leading = false
      model.remoteExperts = null
      await led.end()
    }
  }

  /**
   * Makes `weights` current: receives what other ranks have updated for this one, and takes this rank's experts back from the model after `gather`. All ranks call it. `step` and `evaluate` do,
   * too.
   */
  async synchronize(): Promise<void> {
    this.#checkNotLeading()
    await this.#replicated.gather()
    this.#shards.takeOwn()
    await materialize(this.weights)
  }

  /**
   * Moves the weights of all experts into the model on every rank, to save or generate, if each rank has the memory. All ranks call it. The expert entries of `parameters` are
   * freed until the next step or `release`, which takes this rank's experts from the model as it is then.
   */
  async gather(): Promise<void> {
    await this.synchronize()
    await this.#shards.gather()
  }

  /**
   * Takes this rank's experts back from the model and frees the model's: after `gather`, or after weights were loaded into the model. You may then change `parameters`;
   * `gather` sends the changes to all ranks.
   */
  release(): void {
    this.#shards.takeOwn()
    this.#replicated.takeBack()
  }

  /** Frees this rank's experts, but not the model. */
  dispose(): void {
    this.#replicated.dispose()
    this.#shards.dispose()
  }

  #checkNotLeading(): void {
    if (!this.#leading) return
    throw configError(
      'ExpertParallel',
      'the other ranks compute experts for lead() and take part in nothing else',
      'call it when the function that you passed to lead() has ended',
    )
  }

  /** The number of positions that carry loss, over all ranks. Checks that all ranks have the same number of micro-batches. */
  async #positions(counts: readonly number[]): Promise<number> {
    const { size } = this.ranks
    const [positions, batches, squares] = await this.#sum([
      counts.reduce((sum, count) => sum + count, 0),
      counts.length,
      counts.length ** 2,
    ])
    // The mean of the squares equals the square of the mean only if all numbers are equal.
    if (squares * size === batches ** 2 && batches > 0) return positions
    const problem = `this rank has ${counts.length} micro-batches, all ${size} ranks have ${batches} in total`
    throw configError('ExpertParallel', problem, 'pass the same number on every rank, at least one')
  }

  async #sum(numbers: readonly number[]): Promise<number[]> {
    const own = fromHost(Float32Array.from(numbers), [numbers.length], 'f32', this.#backend)
    const [sum] = await this.ranks.allReduce([own]).finally(() => own.dispose())
    const values = Array.from(await sum.values())
    sum.dispose()
    return values
  }
}

/** The ranks that have the same experts as this one, in all groups of `size` ranks that share the experts; null if there is only one group. */
function withSameExperts(ranks: Communicator, size: number): Communicator | null {
  if (size === ranks.size) return null
  return ranks.group(Array.from({ length: ranks.size / size }, (_, group) => group * size + (ranks.rank % size)))
}
