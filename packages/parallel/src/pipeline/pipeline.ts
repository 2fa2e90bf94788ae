/** @file Training steps of a model that is cut into stages, on this rank. */
import { type Backend, checkOptions, defaultBackend, fromHost, type NamedParameter } from '@moe/core'
import { checkBatches, checkRanks, refusal } from '../check-call.ts'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import { finite, gradientNorm, type StepOptions, type StepResult } from '../gradients.ts'
import { checkSchedule, type Schedule, stagesOf } from '../schedule/schedule.ts'
import { holdersOf, sumReplicas } from './replicas.ts'
import { checkSize, type PipelineStage, runSchedule } from './run-schedule.ts'

/** A model that can be cut; a `DeepSeek` of `@moe/deepseek` is one. `Batch` is what it takes as a micro-batch. */
export interface StageableModel<Batch> {
  inStages(stages: number): ModelInStages<Batch>
}

export interface ModelInStages<Batch> {
  /** Of each stage. A parameter that several stages use is in each of them. The same in the same order on every rank. */
  readonly parameters: ReadonlyArray<readonly NamedParameter[]>
  /** Names of what stages measure. */
  readonly metrics?: readonly string[]
  /** All stages with the micro-batches of one step, and what goes from one to the next. The losses are those of the mean over the micro-batches. */
  step(batches: readonly Batch[]): {
    readonly stages: readonly PipelineStage[]
    readonly between: TensorLike
    /** A whole number of 32 bits, made of the micro-batches: where ranks have different ones, the step is refused. */
    readonly digest?: number
  }
}

/**
 * A model in stages on several ranks. Every rank makes the whole model, with the same weights, and trains its own stages of it: weights, gradients, optimizer state and activations are there for these
 * alone. The others' weights are freed, until `gather` brings them; frozen ones stay.
 *
 * `train` of `@moe/trainer` takes one as its `ranks`.
 */
export class Pipeline<Batch> {
  /** Of this rank's stages: what its optimizer is made from. */
  readonly parameters: readonly NamedParameter[]
  readonly ranks: Communicator
  /** Micro-batches of a step. */
  readonly microBatches: number
  /** The rows of a step that this rank is given, as data orders have it: all. */
  readonly dataShare = { rank: 0, world: 1 } as const
  readonly #schedule: Schedule
  readonly #model: ModelInStages<Batch>

  /** @throws MoeError E_CONFIG when the model cannot be cut into the schedule's stages, and for a schedule of another number of ranks */
  constructor(model: StageableModel<Batch>, schedule: Schedule, ranks: Communicator) {
    if (typeof model?.inStages !== 'function')
      throw refusal('Pipeline', 'the model has no inStages', 'pass a DeepSeek, or a model that can be cut into stages')
    checkRanks('Pipeline', ranks)
    checkSchedule(schedule)
    checkSize(schedule, ranks)
    this.ranks = ranks
    this.microBatches = schedule.microBatches
    this.#schedule = schedule
    this.#model = model.inStages(schedule.stages)
    const own = stagesOf(schedule, ranks.rank).flatMap(stage => this.#model.parameters[stage])
    this.parameters = [...new Map(own.map(named => [named.parameter, named])).values()]
    this.#freeOthers()
  }

  /**
   * Forward and backward passes of a step. Afterwards the parameters of this rank have the gradients of the step, those of before are dropped: clip them by `gradNorm`, and let the
   * optimizer step. All ranks are given the same micro-batches.
   * @param batches as many as the schedule has
   * @throws MoeError E_CONFIG, also when ranks have different ones; E_NAN, on all ranks, when loss or norm is not finite
   */
  async step(batches: readonly Batch[], options: StepOptions = {}): Promise<StepResult> {
    const { microBatches, name } = this.#schedule
    checkOptions('Pipeline.step', options, { precision: true })
    checkBatches(name, batches)
    if (batches.length !== microBatches) {
      const problem = `the schedule has ${microBatches} micro-batches, the step ${batches.length}`
      throw refusal(name, problem, 'make a schedule for as many')
    }
    this.#freeOthers()
    for (const { parameter } of this.parameters) parameter.zeroGrad()
    const { stages, between, digest } = this.#model.step(batches)
    if (digest !== undefined) await this.#needSame(digest, between.backend)
    const sums = await runSchedule(this.#schedule, this.ranks, new Map(stages.entries()), {
      between,
      metrics: this.#model.metrics,
      precision: options.precision,
    })
    const tensors = [sums.loss, ...Object.values(sums.metrics)]
    try {
      await sumReplicas(this.#schedule, this.ranks, this.#parametersOf)
      // What several ranks have is counted once.
      const counted = [...this.#holders()].flatMap(([parameter, [first]]) =>
        first === this.ranks.rank ? [parameter] : [],
      )
      const gradNorm = await gradientNorm(this.ranks, counted, between.backend ?? defaultBackend())
      const [loss, ...metrics] = await Promise.all(tensors.map(tensor => tensor.item()))
      const names = Object.keys(sums.metrics)
      return finite(name, { loss, gradNorm, metrics: Object.fromEntries(names.map((name, i) => [name, metrics[i]])) })
    } finally {
      for (const tensor of tensors) tensor.dispose()
    }
  }

  /** Gives every rank the weights of all stages, from the ranks that train them, until the next step: for measuring, saving and generating. All ranks call it. */
  async gather(): Promise<void> {
    for (const [parameter, holders] of this.#holders()) {
      if (!parameter.trainable) continue
      // Of a freed parameter the shape is known, which is all that is asked of those who receive.
      const [weights] = await this.ranks.broadcast([parameter], holders[0])
      if (holders.includes(this.ranks.rank)) weights.dispose()
      else parameter.assign(weights)
    }
  }

  /** Stages lie on other ranks than the embedding: with other tokens there, the loss would be that of nothing. */
  async #needSame(digest: number, backend: Backend | undefined): Promise<void> {
    const own = fromHost(Int32Array.of(digest, ~digest), [2], 'i32', backend)
    const [largest] = await this.ranks.allReduce([own], 'max').finally(() => own.dispose())
    const [most, complement] = await largest.values()
    largest.dispose()
    if (most === ~complement) return
    const fix = 'make them with the same seed on every rank, without rank and world'
    throw refusal(this.#schedule.name, 'the ranks have different micro-batches', fix)
  }

  #freeOthers(): void {
    for (const [parameter, holders] of this.#holders())
      if (parameter.trainable && !holders.includes(this.ranks.rank)) parameter.dispose()
  }

  readonly #parametersOf = (stage: number) => this.#model.parameters[stage].map(({ parameter }) => parameter)

  #holders() {
    return holdersOf(this.#schedule, this.#parametersOf)
  }
}
