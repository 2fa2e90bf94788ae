/** @file Training steps of a model whose routed experts are spread over ranks, on this rank. */
import {
  checkOptions,
  fromHost,
  full,
  type Module,
  type NamedParameter,
  namedParameters,
  noGrad,
  type Parameter,
  type Precision,
  reduceGradients,
  type Tensor,
  withPrecision,
  zeros,
} from '@moe/core'
import { checkBatches, checkRanks, refusal } from '../check-call.ts'
import type { Communicator } from '../communicator/communicator.ts'
import { finite, gradientNorm, type StepOptions, type StepResult } from '../gradients.ts'
import { PiecewisePass } from './piecewise-pass.ts'
import { type ExpertsShare, type RoutedTokens, routeOverRanks } from './route-over-ranks.ts'

/** A model whose experts can be spread; a `DeepSeek` of `@moe/deepseek` is one. `Batch` is what it takes as a micro-batch. */
export interface SpreadableModel<Batch> extends Module {
  /** Layers with routed experts. Parameters of experts are stacked, `[E, ...]`. */
  readonly moeLayers: ReadonlyArray<{
    readonly experts: Module & { copyOf(from: number, to: number): Module & ExpertsShare }
  }>
  /** The loss of a micro-batch, a mean over its `count` positions, in a pass that is told how the experts of a layer are reached. */
  inPieces(batch: Batch): {
    readonly count: number
    forward(
      pass: Pick<PiecewisePass, 'run'> & {
        piece(inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]): Tensor[]
      },
      route: (layer: number, tokens: RoutedTokens) => Promise<Tensor>,
    ): Promise<{ readonly loss: Tensor; readonly metrics?: Readonly<Record<string, Tensor>> }>
  }
}

/** The share of a rank in the experts of a layer, and whose rows its parameters are. */
interface Spread {
  readonly share: Module & ExpertsShare
  readonly rows: ReadonlyArray<readonly [whole: NamedParameter, own: Parameter]>
  readonly experts: number
}

/**
 * A model whose routed experts are spread over ranks: rank r trains the experts from r E/R to before (r + 1) E/R of every layer, on the tokens of all ranks, and everything else together with the others, on rows of
 * its own. Every rank makes the whole model, with the same weights; those of its experts are copied, and the model's are freed, until `gather` brings all.
 *
 * `train` of `@moe/trainer` takes one as its `ranks`.
 */
export class ExpertParallel<Batch> {
  /** Of this rank: what its optimizer is made from. Experts have the names that they have in the model, whose rows they are from `firstRow` on. */
  readonly parameters: ReadonlyArray<NamedParameter & { readonly firstRow?: number }>
  /** All ranks that the experts are spread over. */
  readonly ranks: Communicator
  /** The rows of a step that this rank is given, as data orders have it. */
  readonly dataShare: { readonly rank: number; readonly world: number }
  readonly #model: SpreadableModel<Batch>
  readonly #layers: readonly Spread[]
  /** Of the step under way. */
  #precision: Precision = 'f32'

  /** @throws MoeError E_CONFIG when the ranks do not divide the experts */
  constructor(model: SpreadableModel<Batch>, ranks: Communicator) {
    if (typeof model?.inPieces !== 'function')
      throw refusal(
        'ExpertParallel',
        'the model has no inPieces',
        'pass a DeepSeek, or a model whose experts can be spread',
      )
    checkRanks('ExpertParallel', ranks)
    this.#model = model
    this.ranks = ranks
    this.dataShare = { rank: ranks.rank, world: ranks.size }
    this.#layers = model.moeLayers.map(({ experts }) => spread(experts, ranks))
    this.#takeOwn()
    const own = new Map(this.#layers.flatMap(({ rows }) => rows.map(([whole, share]) => [whole.parameter, share])))
    this.parameters = namedParameters(model).map(named => {
      const parameter = own.get(named.parameter)
      if (parameter === undefined) return named
      const [from, to] = runOf(named.parameter.shape[0], ranks)
      return { ...named, parameter, firstRow: from, ...(named.slices && { slices: named.slices.slice(from, to) }) }
    })
  }

  /**
   * Forward and backward passes of a step. Afterwards the parameters have the gradients of the step, those of before are dropped: clip them by `gradNorm`, and let the optimizer step.
   * Micro-batches weigh as much as they have positions that count: the step is that of one rank with the micro-batches of all.
   * @param batches of this rank; every rank has as many
   * @throws MoeError E_CONFIG when it has not, or none, and when nothing is to be trained; E_NAN when loss or norm is not finite; both on all ranks
   */
  async step(batches: readonly Batch[], options: StepOptions = {}): Promise<StepResult> {
    checkOptions('ExpertParallel.step', options, { precision: true })
    checkBatches('ExpertParallel', batches)
    if (!this.parameters.some(({ parameter }) => parameter.trainable))
      throw refusal('ExpertParallel', 'all parameters are frozen', 'set trainable on what is to be trained')
    this.#precision = options.precision ?? 'f32'
    this.#takeOwn()
    for (const { parameter } of this.parameters) parameter.zeroGrad()
    const { backend } = this.parameters[0].parameter
    const passes = batches.map(batch => this.#model.inPieces(batch))
    const positions = await this.#positions(passes.map(({ count }) => count))
    const sums: Record<string, number> = {}
    for (const part of passes) {
      const share = part.count / Math.max(1, positions)
      const pass = new PiecewisePass()
      try {
        const { loss, metrics = {} } = await part.forward(
          {
            run: fn => pass.run(fn),
            piece: (inputs, fn) => pass.piece(inputs, (...leaves) => this.#precisely(() => fn(...leaves))),
          },
          (layer, tokens) => this.#route(pass, layer, tokens),
        )
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
    const { own, common } = this.#trained()
    await reduceGradients(common, gradients => this.ranks.allReduce(gradients))
    // No rank has chosen them: a gradient all the same, as on one rank.
    for (const parameter of own) parameter.grad ??= zeros(parameter.shape, { backend })
    const gradNorm = await gradientNorm(this.ranks, this.ranks.rank === 0 ? [...own, ...common] : own, backend)
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
    this.#takeOwn()
    for (const { rows } of this.#layers) {
      for (const [{ parameter }, own] of rows) {
        parameter.assign(await this.ranks.allGather(own))
        own.dispose()
      }
    }
  }

  /** This rank's experts from the model, which loses all, where it has them: it was gathered, or loaded. */
  #takeOwn(): void {
    for (const { rows } of this.#layers) {
      for (const [{ parameter }, own] of rows) {
        if (parameter.handle === null) continue
        own.assign(noGrad(() => parameter.narrow(0, ...runOf(parameter.shape[0], this.ranks))))
        parameter.dispose()
      }
    }
  }

  /** Frees this rank's experts; the model stays. */
  dispose(): void {
    for (const { rows } of this.#layers) for (const [, own] of rows) own.dispose()
  }

  #route(pass: PiecewisePass, layer: number, tokens: RoutedTokens): Promise<Tensor> {
    const { share, experts } = this.#layers[layer]
    const precise: ExpertsShare = { route: (...of) => this.#precisely(() => share.route(...of)) }
    return routeOverRanks(pass, this.ranks, precise, tokens, experts)
  }

  #precisely<T>(fn: () => T): T {
    return withPrecision(this.#precision, fn)
  }

  /** Parameters that are this rank's alone, and those that all have. */
  #trained() {
    const shares = new Set(this.#layers.flatMap(({ rows }) => rows.map(([, own]) => own)))
    const trained = this.parameters.map(({ parameter }) => parameter).filter(({ trainable }) => trainable)
    return {
      own: trained.filter(parameter => shares.has(parameter)),
      common: trained.filter(parameter => !shares.has(parameter)),
    }
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

/** The first expert of a rank, and the end. */
const runOf = (experts: number, { rank, size }: Communicator): [number, number] => [
  (rank * experts) / size,
  ((rank + 1) * experts) / size,
]

function spread(whole: SpreadableModel<never>['moeLayers'][number]['experts'], ranks: Communicator): Spread {
  const stacked = namedParameters(whole)
  const [experts] = stacked[0].parameter.shape
  if (experts % ranks.size !== 0) {
    const problem = `${experts} experts cannot be shared by ${ranks.size} ranks`
    throw refusal('ExpertParallel', problem, 'use a number of ranks that divides them')
  }
  const share = whole.copyOf(...runOf(experts, ranks))
  const own = namedParameters(share)
  return { share, experts, rows: stacked.map((named, i) => [named, own[i].parameter] as const) }
}
