/** @file Training steps of a model whose routed experts are spread over ranks, on this rank. */
import { checkOptions, fromHost, full, type Module, namedParameters, type OwnParameter, type Tensor } from '@moe/core'
import { checkBatches, checkRanks, refusal } from '../check-call.ts'
import type { Communicator } from '../communicator/communicator.ts'
import { finite, gradientNorm, type ParallelStepOptions, type ParallelStepResult } from '../gradients.ts'
import { Replicated } from '../replicated.ts'
import {
  ExpertShares,
  expertRanks,
  type PieceRunner,
  type RouteElsewhere,
  type SpreadableLayer,
} from './expert-shares.ts'
import { PiecewisePass } from './piecewise-pass.ts'

/** A model whose experts can be spread; a `DeepSeek` of `@moe/deepseek` is one. `Batch` is what it takes as a micro-batch. */
export interface SpreadableModel<Batch> extends Module {
  /** Layers with routed experts. */
  readonly moeLayers: readonly SpreadableLayer[]
  /** The loss of a micro-batch, a mean over its `count` positions, in a pass that is told how the experts of a layer are reached. */
  inPieces(batch: Batch): {
    readonly count: number
    forward(
      pass: PieceRunner,
      route: RouteElsewhere,
    ): Promise<{ readonly loss: Tensor; readonly metrics?: Readonly<Record<string, Tensor>> }>
  }
}

/**
 * A model whose routed experts are spread over ranks: of n ranks that share them out, the r-th trains the experts from r E/n to before (r + 1) E/n of every layer, on the tokens of all n, and everything else together with the others, on rows of
 * its own. Every rank makes the whole model, with the same weights; those of its experts are copied, and the model's are freed, until `gather` brings all.
 *
 * Where fewer than all ranks share the experts out, each so many in a row do, and gradients of experts are summed over all that have the same.
 *
 * `train` of `@moe/trainer` takes one as its `ranks`.
 */
export class ExpertParallel<Batch> {
  /** Of this rank: what its optimizer is made from. Experts have the names that they have in the model, whose rows they are from `firstRow` on. */
  parameters: readonly OwnParameter[]
  /** All ranks that the experts are spread over. */
  readonly ranks: Communicator
  /** The rows of a step that this rank is given, as data orders have it. */
  readonly dataShare: { readonly rank: number; readonly world: number }
  readonly #model: SpreadableModel<Batch>
  readonly #shares: ExpertShares
  readonly #replicated: Replicated

  /**
   * @param options.expertParallelSize ranks that share the experts out. Default: all.
   * @throws MoeError E_CONFIG when these do not divide the experts, or the ranks
   */
  constructor(
    model: SpreadableModel<Batch>,
    ranks: Communicator,
    options: { readonly expertParallelSize?: number } = {},
  ) {
    const op = 'ExpertParallel'
    checkOptions(op, options, { expertParallelSize: true })
    if (typeof model?.inPieces !== 'function')
      throw refusal(op, 'the model has no inPieces', 'pass a DeepSeek, or a model whose experts can be spread')
    checkRanks(op, ranks)
    this.#model = model
    this.ranks = ranks
    this.dataShare = { rank: ranks.rank, world: ranks.size }
    const { expertParallelSize = ranks.size } = options
    this.#shares = new ExpertShares(op, new Map(model.moeLayers.entries()), expertRanks(op, ranks, expertParallelSize))
    this.parameters = namedParameters(model).map(named => this.#shares.own(named))
    this.#replicated = new Replicated([
      { parameters: this.parameters.filter(({ firstRow }) => firstRow === undefined), ranks },
      { parameters: this.parameters.filter(({ firstRow }) => firstRow !== undefined), ranks: this.#shares.ranks.same },
    ])
  }

  /**
   * Shares out what several ranks have alike: each keeps the optimizer's state of a part, and updates it for all; weights are exchanged at the begin of the next step, and by `gather`. `parameters` are then this rank's. For before the optimizer is made,
   * on all ranks; `train` does it.
   */
  shareOptimizer(): void {
    this.parameters = this.#replicated.shareOut()
  }

  /**
   * Forward and backward passes of a step. Afterwards the parameters have the gradients of the step, those of before are dropped: clip them by `gradNorm`, and let the optimizer step.
   * Micro-batches weigh as much as they have positions that count: the step is that of one rank with the micro-batches of all.
   * @param batches of this rank; every rank has as many
   * @throws MoeError E_CONFIG when it has not, or none, and when nothing is to be trained; E_NAN when loss or norm is not finite; both on all ranks
   */
  async step(batches: readonly Batch[], options: ParallelStepOptions = {}): Promise<ParallelStepResult> {
    checkOptions('ExpertParallel.step', options, { precision: true })
    checkBatches('ExpertParallel', batches)
    if (!this.parameters.some(({ parameter }) => parameter.trainable))
      throw refusal('ExpertParallel', 'all parameters are frozen', 'set trainable on what is to be trained')
    const { precision } = options
    await this.#replicated.gather()
    this.#shares.takeOwn()
    this.#replicated.zeroGradients()
    const { backend } = this.parameters[0].parameter
    const passes = batches.map(batch => this.#model.inPieces(batch))
    const positions = await this.#positions(passes.map(({ count }) => count))
    const sums: Record<string, number> = {}
    for (const part of passes) {
      const share = part.count / Math.max(1, positions)
      const pass = new PiecewisePass({ precision })
      try {
        const { loss, metrics = {} } = await part.forward(pass, this.#shares.routeIn(pass))
        await pass.backward(
          loss,
          pass.run(() => full([], share, { backend })),
        )
        for (const [name, value] of Object.entries({ loss, ...metrics }))
          sums[name] = (sums[name] ?? 0) + share * (await value.item())
      } finally {
        pass.dispose()
      }
    }
    this.#shares.completeGradients()
    await this.#replicated.sumGradients()
    const gradNorm = await gradientNorm(this.ranks, this.#replicated.counted(), backend)
    const [loss, ...metrics] = await this.#sum(Object.values(sums))
    const names = Object.keys(sums).slice(1)
    const result = { loss, gradNorm, metrics: Object.fromEntries(names.map((name, i) => [name, metrics[i]])) }
    return finite('ExpertParallel', result)
  }

  /**
   * Gives the model on every rank the weights of all experts: for measuring, saving and generating. All ranks call it. They are moved: `parameters` of experts are freed until the next step, which takes
   * this rank's back from the model as it is then.
   */
  async gather(): Promise<void> {
    await this.#replicated.gather()
    await this.#shares.gather()
  }

  /** Takes what this rank trains back from the model, which loses all experts: after `gather`, or when it was loaded. `parameters` may be changed then, and `gather` brings all again. */
  release(): void {
    this.#shares.takeOwn()
    this.#replicated.takeBack()
  }

  /** Frees this rank's experts; the model stays. */
  dispose(): void {
    this.#replicated.dispose()
    this.#shares.dispose()
  }

  /** Those that carry loss, of all ranks. */
  async #positions(counts: readonly number[]): Promise<number> {
    const { size } = this.ranks
    const [positions, batches, squares] = await this.#sum([
      counts.reduce((sum, count) => sum + count, 0),
      counts.length,
      counts.length ** 2,
    ])
    // Equal numbers, and no others, have a mean of squares that is the square of their mean.
    if (squares * size === batches ** 2 && batches > 0) return positions
    const problem = `this rank has ${counts.length} micro-batches, all ${size} have ${batches} together`
    throw refusal('ExpertParallel', problem, 'give every rank as many, one or more')
  }

  async #sum(numbers: readonly number[]): Promise<number[]> {
    const { backend } = this.parameters[0].parameter
    const own = fromHost(Float32Array.from(numbers), [numbers.length], 'f32', backend)
    const [sum] = await this.ranks.allReduce([own]).finally(() => own.dispose())
    const values = Array.from(await sum.values())
    sum.dispose()
    return values
  }
}
