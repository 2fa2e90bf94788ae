/** @file Pipeline parallelism: training steps of a model that is split into stages. */
import {
  type Backend,
  checkOptions,
  defaultBackend,
  fromHost,
  type LocalParameter,
  materialize,
  type NamedParameter,
  namedParameters,
  type Parameter,
  type Tensor,
  zeros,
} from '@moe/core'
import { checkBatches, checkRanks, configError } from '../check-call.ts'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import { type ExpertParallelLayer, ExpertShards, expertRanks } from '../experts/expert-shards.ts'
import {
  type EvaluatedBatch,
  type EvaluatedLoss,
  finite,
  gradientNorm,
  type ParallelStepOptions,
  type ParallelStepResult,
} from '../gradients.ts'
import { type Replicas, Replicated } from '../replicated.ts'
import { checkSchedule, type PipelineSchedule, stagesOf } from '../schedule/schedule.ts'
import { heldInRounds, holdersOf } from './replicas.ts'
import { runForward } from './run-forward.ts'
import { checkSize, type PipelineStage, runSchedule } from './run-schedule.ts'

/** A model that supports pipeline parallelism, such as `DeepSeek` of `@moe/deepseek`. `Batch` is the type of its micro-batches. */
export interface PipelineModel<Batch> {
  /** Splits the model into the given number of stages. @throws MoeError E_CONFIG if the model cannot be split into so many */
  inStages(stages: number): PipelineStages<Batch>
  /** The layers with routed experts, if the model also supports expert parallelism; its stages then implement `inPieces`. */
  readonly moeLayers?: readonly ExpertParallelLayer[]
}

/** A model that is split into stages. */
export interface PipelineStages<Batch> {
  /** The parameters of each stage, the same in the same order on every rank. A parameter that several stages use is listed in each of them. */
  readonly parameters: ReadonlyArray<readonly NamedParameter[]>
  /** Names of the metrics that the stages return. */
  readonly metrics?: readonly string[]
  /** Prepares a step: returns all stages for its micro-batches. Their losses sum to the mean loss over the micro-batches. */
  step(batches: readonly Batch[]): {
    /** One for each stage. */
    readonly stages: readonly PipelineStage[]
    /** Shape and dtype of the activations between stages. */
    readonly activations: TensorLike
    /** The number of positions that carry loss in all micro-batches: the weight of this pipeline among its replicas. Default: equal weights. */
    readonly count?: number
    /** A 32-bit integer hash of the micro-batches. If it differs between the ranks of a pipeline, the step is rejected. */
    readonly digest?: number
  }
  /** Prepares an evaluation: returns all stages, or the first ones, for its micro-batches. The losses of the last of these stages sum to the negative log-likelihood of the micro-batch. */
  evaluation?(batches: ReadonlyArray<EvaluatedBatch<Batch>>): {
    readonly stages: readonly PipelineStage[]
    /** Shape and dtype of the activations between stages, for each micro-batch. */
    readonly activations: readonly TensorLike[]
    /** The number of positions that count, for each micro-batch. */
    readonly counts: readonly number[]
  }
}

/**
 * Pipeline parallelism: a model whose stages are on different ranks. Create the model on every rank with the same weights, within `deferWeights` if they do not fit. Each rank keeps and trains the stages that
 * the schedule assigns to it: it holds weights, gradients, optimizer state and activations of these only. The constructor frees the trainable weights of the other stages,
 * until `gather` restores them; frozen weights remain.
 *
 * If the number of ranks is a multiple of that of the schedule, consecutive ranks form replicas of the pipeline (data parallelism): all take every step together, each with its own
 * rows. With `expertParallelSize`, that many consecutive pipelines also share the experts of their stages (expert parallelism): each rank holds a shard of them, for the tokens of all.
 *
 * Pass it to `train` of `@moe/trainer` as `ranks`.
 */
export class Pipeline<Batch> {
  /** The parameters of this rank's stages; create its optimizer from them. Frozen and quantized weights are included and do not change. */
  parameters: readonly LocalParameter[]
  /**
   * All parameters whose weights this rank holds: `parameters`, those that other ranks update for it after `shardOptimizer`, and what is not trained in other stages, such as the selection biases of
   * routers.
   */
  readonly weights: readonly LocalParameter[]
  /** The ranks of all pipelines. */
  readonly ranks: Communicator
  /** The number of micro-batches of a step in each pipeline. */
  readonly microBatches: number
  /** This rank's share of the rows of a step, for `TrainingOrder` of `@moe/trainer`: all rows, or those of its pipeline. */
  readonly dataShard: { readonly rank: number; readonly world: number }
  /** The ranks of this pipeline. */
  readonly #line: Communicator
  /** The ranks that have the same stages in the other pipelines, and this one; null if there is only one pipeline. */
  readonly #replicas: Communicator | null
  readonly #schedule: PipelineSchedule
  readonly #model: PipelineStages<Batch>
  /** This rank's shard of the experts of its stages; null if each pipeline has all experts. */
  readonly #shards: ExpertShards | null
  readonly #replicated: Replicated

  /**
   * @param options.expertParallelSize the number of pipelines that share the experts of their stages. Default: 1, each pipeline has all experts
   * @throws MoeError E_CONFIG if the model cannot be split into the schedule's stages, if the number of ranks is not a multiple of the schedule's, or if `expertParallelSize`
   * does not divide the number of pipelines and the number of experts
   */
  constructor(
    model: PipelineModel<Batch>,
    schedule: PipelineSchedule,
    ranks: Communicator,
    options: { readonly expertParallelSize?: number } = {},
  ) {
    checkOptions('Pipeline', options, { expertParallelSize: true })
    const { expertParallelSize = 1 } = options
    if (typeof model?.inStages !== 'function')
      throw configError(
        'Pipeline',
        'the model has no inStages()',
        'pass a DeepSeek, or a model that implements PipelineModel',
      )
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
    this.dataShard = { rank: Math.floor(ranks.rank / length), world }
    this.#schedule = schedule
    this.#model = model.inStages(schedule.stages)
    const own = stagesOf(schedule, this.#line.rank).flatMap(stage => this.#model.parameters[stage])
    const named = new Map(own.map(named => [named.parameter, named]))
    this.#shards =
      expertParallelSize === 1
        ? null
        : new ExpertShards(
            'Pipeline',
            layersWith(model, named),
            expertRanks('Pipeline', ranks, expertParallelSize, { stride: length, overlapping: true }),
          )
    this.parameters = Array.from(named.values(), each => this.#shards?.own(each) ?? each)
    const all = new Map(this.#model.parameters.flat().map(named => [named.parameter, named]))
    const untrained = [...all.values()].filter(({ parameter }) => !parameter.trainable && !named.has(parameter))
    this.weights = [...this.parameters, ...untrained]
    this.#replicated = new Replicated(this.#replicaGroups(expertParallelSize))
    this.#freeOthers()
  }

  /**
   * Shards the optimizer state of parameters that several ranks hold (ZeRO-1), in several pipelines or on two ranks of one (DualPipe): each rank updates its shard for all of
   * them, and updated weights are exchanged at the start of the next step and by `gather`. Afterwards `parameters` are those that this rank updates. Call it on all ranks before you create the optimizer;
   * `train` does.
   */
  shardOptimizer(): void {
    this.parameters = this.#replicated.shard()
  }

  /**
   * Runs the forward and backward passes of a step and replaces the gradients of `parameters`. Clip them by `gradNorm` and call the optimizer afterwards.
   * @param batches the micro-batches, as many as the schedule has, the same on all ranks of a pipeline
   * @throws MoeError E_CONFIG if the number of micro-batches is wrong or they differ between ranks of a pipeline; E_NAN, on all ranks, if the loss or the gradient norm is not
   * finite
   */
  async step(batches: readonly Batch[], options: ParallelStepOptions = {}): Promise<ParallelStepResult> {
    const { microBatches, name } = this.#schedule
    checkOptions('Pipeline.step', options, { precision: true })
    checkBatches(name, batches)
    if (batches.length !== microBatches) {
      const problem = `expected ${microBatches} micro-batches, got ${batches.length}`
      throw configError(name, problem, `pass as many as the schedule has, or create a schedule for ${batches.length}`)
    }
    await this.synchronize()
    this.#replicated.zeroGradients()
    const { stages, activations, count, digest } = this.#model.step(batches)
    if (digest !== undefined) await this.#checkSameBatches(digest, activations.backend)
    const weight = await this.#weightOf(count ?? 1, activations.backend)
    const shards = this.#shards
    const sums = await runSchedule(this.#schedule, this.#line, new Map(stages.entries()), {
      activations,
      metrics: this.#model.metrics,
      precision: options.precision,
      weight,
      ...(shards && { route: pass => shards.routeIn(pass) }),
    })
    const numbers = await this.#overReplicas([sums.loss, ...Object.values(sums.metrics)])
    shards?.completeGradients()
    this.#completeGradients()
    await this.#replicated.sumGradients()
    const gradNorm = await gradientNorm(this.ranks, this.#replicated.counted(), activations.backend ?? defaultBackend())
    const [loss, ...metrics] = numbers
    const names = Object.keys(sums.metrics)
    return finite(name, { loss, gradNorm, metrics: Object.fromEntries(names.map((name, i) => [name, metrics[i]])) })
  }

  /**
   * Runs forward passes without gradients, for an evaluation. The ranks of a pipeline call it with the same micro-batches, and all pipelines with the same number.
   * @param batches at most as many as the schedule has
   * @returns the loss of each micro-batch; null if another rank of the pipeline has it
   * @throws MoeError E_CONFIG if the model has no `evaluation`
   */
  async evaluate(
    batches: ReadonlyArray<EvaluatedBatch<Batch>>,
    options: ParallelStepOptions = {},
  ): Promise<Array<EvaluatedLoss | null>> {
    const { name, microBatches } = this.#schedule
    checkOptions('Pipeline.evaluate', options, { precision: true })
    if (batches.length > microBatches) {
      const problem = `expected at most ${microBatches} micro-batches, got ${batches.length}`
      throw configError(name, problem, 'call it several times')
    }
    const parts = this.#model.evaluation?.(batches)
    if (parts === undefined)
      throw configError(
        name,
        'the stages of the model have no evaluation()',
        'implement it, or evaluate after gather()',
      )
    await this.synchronize()
    const { stages, activations, counts } = parts
    const shards = this.#shards
    const losses = await runForward(this.#schedule, this.#line, stages, {
      activations,
      precision: options.precision,
      ...(shards && { route: pass => shards.routeIn(pass) }),
    })
    return losses.map((nll, m) => (nll === null ? null : { nll, count: counts[m] }))
  }

  /**
   * Makes `weights` current: receives what other ranks have updated for this one, and frees what `gather` has restored. All ranks call it. `step` and `evaluate` do, too.
   */
  async synchronize(): Promise<void> {
    await this.#replicated.gather()
    this.#takeOwn()
    await materialize(this.weights)
  }

  /**
   * Restores the weights of all stages in the model on every rank, to save or generate, if each rank has the memory. All ranks call it. The next step or `release` frees the other stages'
   * weights again.
   */
  async gather(): Promise<void> {
    await this.synchronize()
    await this.#shards?.gather()
    for (const [parameter, holders] of this.#holders()) {
      if (!parameter.trainable) continue
      // Receivers pass their freed parameter: only its shape is used.
      const [weights] = await this.#line.broadcast([parameter], holders[0])
      if (holders.includes(this.#line.rank)) weights.dispose()
      else parameter.assign(weights)
    }
  }

  /**
   * Takes this rank's parameters back from the model and frees the weights of the other stages: after `gather`, or after weights were loaded into the model. You may then change
   * `parameters`; `gather` sends the changes to all ranks.
   */
  release(): void {
    this.#takeOwn()
    this.#replicated.takeBack()
  }

  /** Frees this rank's shard of the experts, but not the model. */
  dispose(): void {
    this.#replicated.dispose()
    this.#shards?.dispose()
  }

  #takeOwn(): void {
    this.#shards?.takeOwn()
    this.#freeOthers()
  }

  /** The first stage reads the tokens and the last one the targets: if they differ between ranks, the loss is meaningless. */
  async #checkSameBatches(digest: number, backend: Backend | undefined): Promise<void> {
    const own = fromHost(Int32Array.of(digest, ~digest), [2], 'i32', backend)
    const [largest] = await this.#line.allReduce([own], 'max').finally(() => own.dispose())
    const [most, complement] = await largest.values()
    largest.dispose()
    const different = fromHost(Float32Array.of(Number(most !== ~complement)), [], 'f32', backend)
    const [pipelines] = await this.#overReplicas([different])
    if (pipelines === 0) return
    const fix = 'use the same seed on every rank, and pass ...pipeline.dataShard to TrainingOrder'
    throw configError(this.#schedule.name, 'the ranks of a pipeline have different micro-batches', fix)
  }

  /** The weight of this pipeline's losses among its replicas. */
  async #weightOf(count: number, backend: Backend | undefined): Promise<number> {
    if (this.#replicas === null) return 1
    const [all] = await this.#overReplicas([fromHost(Float32Array.of(count), [], 'f32', backend)])
    return count / Math.max(1, all)
  }

  /** Sums scalars over all pipelines, and frees them. */
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

  /** Where several ranks of a pipeline hold a parameter, the pass of one may leave it without a gradient: gives it zeros, to be summed. */
  #completeGradients(): void {
    for (const [whole, holders] of this.#holders()) {
      const parameter = this.#shards?.rows.get(whole) ?? whole
      if (holders.length > 1 && holders.includes(this.#line.rank) && parameter.trainable)
        parameter.grad ??= zeros(parameter.shape, { backend: parameter.backend })
    }
  }

  /** This rank's parameters by the ranks of all pipelines that hold them. */
  #replicaGroups(expertParallelSize: number): Replicas[] {
    const { ranks, parameters } = this
    const { rank: place, size: length } = this.#line
    const pipelines = Array.from({ length: ranks.size / length }, (_, at) => at)
    const sameShard = pipelines.filter(at => (at - this.dataShard.rank) % expertParallelSize === 0)
    const groupOf = (pipelines: readonly number[], holders: readonly number[]) => {
      const members = pipelines.flatMap(at => holders.map(holder => at * length + holder))
      // All ranks create all groups, also those of a single rank.
      const group = ranks.group(members)
      return members.length === 1 ? null : group
    }
    const own = new Map(parameters.map(named => [named.parameter, named]))
    return heldInRounds(this.#holders()).flatMap(round => {
      const alone = { holders: [place], parameters: [] }
      const { holders, parameters } = round.find(({ holders }) => holders.includes(place)) ?? alone
      const replicated = parameters.flatMap(parameter => own.get(parameter) ?? [])
      const all = { parameters: replicated, ranks: groupOf(pipelines, holders) }
      if (this.#shards === null) return [all]
      const experts = parameters.flatMap(parameter => own.get(this.#shards?.rows.get(parameter) as Parameter) ?? [])
      return [all, { parameters: experts, ranks: groupOf(sameShard, holders) }]
    })
  }

  #holders() {
    return holdersOf(this.#schedule, this.#parametersOf)
  }
}

/** The layers with routed experts that contain any of the parameters, by number. @throws MoeError E_CONFIG if the model does not support expert parallelism */
function layersWith<Batch>(
  { moeLayers }: PipelineModel<Batch>,
  parameters: ReadonlyMap<Parameter, NamedParameter>,
): Map<number, ExpertParallelLayer> {
  if (moeLayers === undefined)
    throw configError('Pipeline', 'the model has no moeLayers', 'leave out expertParallelSize, or pass a DeepSeek')
  const isHere = ({ experts }: ExpertParallelLayer) =>
    namedParameters(experts).some(({ parameter }) => parameters.has(parameter))
  return new Map([...moeLayers.entries()].filter(([, layer]) => isHere(layer)))
}
