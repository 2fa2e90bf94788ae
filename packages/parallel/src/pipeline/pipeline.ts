/** @file Training steps of a model that is cut into stages, on this rank. */
import {
  type Backend,
  checkOptions,
  defaultBackend,
  fromHost,
  type NamedParameter,
  namedParameters,
  type OwnParameter,
  type Parameter,
  type Tensor,
} from '@moe/core'
import { checkBatches, checkRanks, refusal } from '../check-call.ts'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import { ExpertShares, expertRanks, type SpreadableLayer } from '../experts/expert-shares.ts'
import { finite, gradientNorm, type ParallelStepOptions, type ParallelStepResult } from '../gradients.ts'
import { Replicated } from '../replicated.ts'
import { checkSchedule, type PipelineSchedule, stagesOf } from '../schedule/schedule.ts'
import { holdersOf, sumReplicas } from './replicas.ts'
import { checkSize, type PipelineStage, runSchedule } from './run-schedule.ts'

/** A model that can be cut; a `DeepSeek` of `@moe/deepseek` is one. `Batch` is what it takes as a micro-batch. */
export interface StageableModel<Batch> {
  /** Cuts it into so many stages. @throws MoeError E_CONFIG when there are more than can be made */
  inStages(stages: number): ModelInStages<Batch>
  /** Layers with routed experts, where these can be spread; stages have `inPieces` then. */
  readonly moeLayers?: readonly SpreadableLayer[]
}

/** A model that was cut. */
export interface ModelInStages<Batch> {
  /** Of each stage. A parameter that several stages use is in each of them. The same in the same order on every rank. */
  readonly parameters: ReadonlyArray<readonly NamedParameter[]>
  /** Names of what stages measure. */
  readonly metrics?: readonly string[]
  /** All stages with the micro-batches of one step, and what goes from one to the next. The losses are those of the mean over the micro-batches. */
  step(batches: readonly Batch[]): {
    readonly stages: readonly PipelineStage[]
    readonly between: TensorLike
    /** Positions of all micro-batches that carry loss: replicas weigh as much as they have. Default: all weigh the same. */
    readonly count?: number
    /** A whole number of 32 bits, made of the micro-batches: where ranks have different ones, the step is refused. */
    readonly digest?: number
  }
}

/**
 * A model in stages on several ranks. Every rank makes the whole model, with the same weights, and trains its own stages of it: weights, gradients, optimizer state and activations are there for these
 * alone. The others' weights are freed, until `gather` brings them; frozen ones stay.
 *
 * Where there are several times as many ranks as the schedule has, each so many in a row are a pipeline, and all pipelines take every step together, each with rows of its own. Of these, each `expertParallelSize` in a row
 * share the experts of their stages out: a rank has its part of them, for the tokens of all.
 *
 * `train` of `@moe/trainer` takes one as its `ranks`.
 */
export class Pipeline<Batch> {
  /** Of this rank's stages: what its optimizer is made from. Weights that are frozen or stored in fewer bits stay as they are. */
  parameters: readonly OwnParameter[]
  /** The ranks of all pipelines. */
  readonly ranks: Communicator
  /** Micro-batches of a step in a pipeline. */
  readonly microBatches: number
  /** The rows of a step that this rank is given, as data orders have it: all, or those of its pipeline. */
  readonly dataShare: { readonly rank: number; readonly world: number }
  /** The ranks of this pipeline. */
  readonly #line: Communicator
  /** Those that have the same stages, in all pipelines; null where there is one. */
  readonly #replicas: Communicator | null
  readonly #schedule: PipelineSchedule
  readonly #model: ModelInStages<Batch>
  /** Of the experts of its stages, where pipelines share them out. */
  readonly #shares: ExpertShares | null
  readonly #replicated: Replicated

  /**
   * @param options.expertParallelSize pipelines that share experts out. Default 1: each has all.
   * @throws MoeError E_CONFIG when the model cannot be cut into the schedule's stages, for a schedule whose ranks do not divide these, and for a size that does not divide the pipelines or the experts
   */
  constructor(
    model: StageableModel<Batch>,
    schedule: PipelineSchedule,
    ranks: Communicator,
    options: { readonly expertParallelSize?: number } = {},
  ) {
    checkOptions('Pipeline', options, { expertParallelSize: true })
    const { expertParallelSize = 1 } = options
    if (typeof model?.inStages !== 'function')
      throw refusal('Pipeline', 'the model has no inStages', 'pass a DeepSeek, or a model that can be cut into stages')
    checkRanks('Pipeline', ranks)
    checkSchedule(schedule)
    this.ranks = ranks
    this.microBatches = schedule.microBatches
    const { length } = schedule.ranks
    const world = ranks.size / length
    if (world < 2 || !Number.isInteger(world)) {
      checkSize(schedule, ranks)
      this.#line = ranks
      this.#replicas = null
    } else {
      const place = ranks.rank % length
      this.#line = ranks.group(Array.from({ length }, (_, at) => ranks.rank - place + at))
      this.#replicas = ranks.group(Array.from({ length: world }, (_, replica) => replica * length + place))
    }
    this.dataShare = { rank: Math.floor(ranks.rank / length), world }
    this.#schedule = schedule
    this.#model = model.inStages(schedule.stages)
    const own = stagesOf(schedule, this.#line.rank).flatMap(stage => this.#model.parameters[stage])
    const named = new Map(own.map(named => [named.parameter, named]))
    this.#shares =
      expertParallelSize === 1
        ? null
        : new ExpertShares(
            'Pipeline',
            layersWith(model, named),
            expertRanks('Pipeline', ranks, expertParallelSize, { stride: length, overlapping: true }),
          )
    this.parameters = Array.from(named.values(), each => this.#shares?.own(each) ?? each)
    this.#replicated = new Replicated([
      { parameters: this.parameters.filter(({ firstRow }) => firstRow === undefined), ranks: this.#replicas },
      {
        parameters: this.parameters.filter(({ firstRow }) => firstRow !== undefined),
        ranks: this.#shares?.ranks.same ?? null,
      },
    ])
    this.#freeOthers()
  }

  /**
   * Shares out what several pipelines have alike: each rank keeps the optimizer's state of a part, and updates it for all; weights are exchanged at the begin of the next step, and by `gather`. `parameters` are then this rank's. For before the optimizer
   * is made, on all ranks; `train` does it.
   */
  shareOptimizer(): void {
    this.parameters = this.#replicated.shareOut()
  }

  /**
   * Forward and backward passes of a step. Afterwards the parameters of this rank have the gradients of the step, those of before are dropped: clip them by `gradNorm`, and let the
   * optimizer step. All ranks of a pipeline are given the same micro-batches.
   * @param batches as many as the schedule has
   * @throws MoeError E_CONFIG, also when ranks of a pipeline have different ones; E_NAN, on all ranks, when loss or norm is not finite
   */
  async step(batches: readonly Batch[], options: ParallelStepOptions = {}): Promise<ParallelStepResult> {
    const { microBatches, name } = this.#schedule
    checkOptions('Pipeline.step', options, { precision: true })
    checkBatches(name, batches)
    if (batches.length !== microBatches) {
      const problem = `the schedule has ${microBatches} micro-batches, the step ${batches.length}`
      throw refusal(name, problem, 'make a schedule for as many')
    }
    await this.#replicated.gather()
    this.#takeOwn()
    this.#replicated.zeroGradients()
    const { stages, between, count, digest } = this.#model.step(batches)
    if (digest !== undefined) await this.#needSame(digest, between.backend)
    const weight = await this.#share(count ?? 1, between.backend)
    const shares = this.#shares
    const sums = await runSchedule(this.#schedule, this.#line, new Map(stages.entries()), {
      between,
      metrics: this.#model.metrics,
      precision: options.precision,
      weight,
      ...(shares && { route: pass => shares.routeIn(pass) }),
    })
    const numbers = await this.#overReplicas([sums.loss, ...Object.values(sums.metrics)])
    const rowsOf = (parameter: Parameter) => shares?.rows.get(parameter) ?? parameter
    await sumReplicas(this.#schedule, this.#line, stage => this.#parametersOf(stage).map(rowsOf))
    shares?.completeGradients()
    await this.#replicated.sumGradients()
    // What several ranks of a pipeline have is counted once.
    const first = this.#firstHere()
    const counted = this.#replicated.counted(({ name }) => first.has(name))
    const gradNorm = await gradientNorm(this.ranks, counted, between.backend ?? defaultBackend())
    const [loss, ...metrics] = numbers
    const names = Object.keys(sums.metrics)
    return finite(name, { loss, gradNorm, metrics: Object.fromEntries(names.map((name, i) => [name, metrics[i]])) })
  }

  /** Gives every rank the weights of all stages, from the ranks that train them, until the next step: for measuring, saving and generating. All ranks call it. */
  async gather(): Promise<void> {
    await this.#replicated.gather()
    await this.#shares?.gather()
    for (const [parameter, holders] of this.#holders()) {
      if (!parameter.trainable) continue
      // Of a freed parameter the shape is known, which is all that is asked of those who receive.
      const [weights] = await this.#line.broadcast([parameter], holders[0])
      if (holders.includes(this.#line.rank)) weights.dispose()
      else parameter.assign(weights)
    }
  }

  /** Takes what this rank trains back from the model, and frees the others' weights: after `gather`, or when it was loaded. `parameters` may be changed then, and `gather` brings all again. */
  release(): void {
    this.#takeOwn()
    this.#replicated.takeBack()
  }

  /** Frees this rank's part of experts that are shared out; the model stays. */
  dispose(): void {
    this.#replicated.dispose()
    this.#shares?.dispose()
  }

  #takeOwn(): void {
    this.#shares?.takeOwn()
    this.#freeOthers()
  }

  /** Stages lie on other ranks than the embedding: with other tokens there, the loss would be that of nothing. */
  async #needSame(digest: number, backend: Backend | undefined): Promise<void> {
    const own = fromHost(Int32Array.of(digest, ~digest), [2], 'i32', backend)
    const [largest] = await this.#line.allReduce([own], 'max').finally(() => own.dispose())
    const [most, complement] = await largest.values()
    largest.dispose()
    const different = fromHost(Float32Array.of(Number(most !== ~complement)), [], 'f32', backend)
    const [pipelines] = await this.#overReplicas([different])
    if (pipelines === 0) return
    const fix = 'make them with the same seed on every rank, with { ...pipeline.dataShare }'
    throw refusal(this.#schedule.name, 'the ranks have different micro-batches', fix)
  }

  /** What the losses of this pipeline are multiplied by. */
  async #share(count: number, backend: Backend | undefined): Promise<number> {
    if (this.#replicas === null) return 1
    const [all] = await this.#overReplicas([fromHost(Float32Array.of(count), [], 'f32', backend)])
    return count / Math.max(1, all)
  }

  /** Sums of scalars over all pipelines. The tensors are freed. */
  async #overReplicas(own: readonly Tensor[]): Promise<number[]> {
    const sums = this.#replicas === null ? [] : await this.#replicas.allReduce(own)
    try {
      return await Promise.all((this.#replicas === null ? own : sums).map(tensor => tensor.item()))
    } finally {
      for (const tensor of [...own, ...sums]) tensor.dispose()
    }
  }

  #freeOthers(): void {
    for (const [parameter, holders] of this.#holders())
      if (parameter.trainable && !holders.includes(this.#line.rank)) parameter.dispose()
  }

  readonly #parametersOf = (stage: number) => this.#model.parameters[stage].map(({ parameter }) => parameter)

  /** Names of parameters that no rank before this one has, in its pipeline. */
  #firstHere(): Set<string> {
    const holders = this.#holders()
    const named = this.#model.parameters.flat()
    const first = named.filter(({ parameter }) => holders.get(parameter)?.[0] === this.#line.rank)
    return new Set(first.map(({ name }) => name))
  }

  #holders() {
    return holdersOf(this.#schedule, this.#parametersOf)
  }
}

/** Those of whose experts these are the parameters, by number. @throws MoeError E_CONFIG for a model whose experts cannot be spread */
function layersWith<Batch>(
  { moeLayers }: StageableModel<Batch>,
  parameters: ReadonlyMap<Parameter, NamedParameter>,
): Map<number, SpreadableLayer> {
  if (moeLayers === undefined)
    throw refusal('Pipeline', 'the model has no moeLayers', 'leave expertParallelSize out, or pass a DeepSeek')
  const isHere = ({ experts }: SpreadableLayer) =>
    namedParameters(experts).some(({ parameter }) => parameters.has(parameter))
  return new Map([...moeLayers.entries()].filter(([, layer]) => isHere(layer)))
}
