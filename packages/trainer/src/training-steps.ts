/** @file The training steps of a run: op by op, or recorded and replayed if backend, model and optimizer support it. */
import {
  type Backend,
  checkOptions,
  checkPrecision,
  isMoeError,
  MoeError,
  type NamedParameter,
  namedStreams,
  type Parameter,
  type ParameterShard,
  type Precision,
} from '@moe/core'
import type { StagedStep, TokenBatch, TrainableModel } from './model.ts'
import { nonFiniteStep, nonFiniteStepOnRanks } from './non-finite.ts'
import { isStaged, type Optimizer } from './optim/optimizer.ts'
import type { Ranks, RecordableRanks } from './ranks.ts'
import {
  kindOf,
  type PreparedBatch,
  RecordedStep,
  type Recorder,
  type StagedBatch,
  type StepParts,
} from './recorded-step.ts'
import { type ShardedUpdate, shardedAmong } from './sharded-update.ts'
import type { StepNumbers } from './step-numbers.ts'
import { trainingStep } from './training-step.ts'

/** Options of `TrainingSteps`. */
export interface TrainingStepsOptions {
  /** Clips the global gradient norm to this value. Default 1; Infinity disables clipping. */
  readonly clip?: number | undefined
  /** Precision of matrix products. Default f32. */
  readonly precision?: Precision | undefined
  /**
   * Records a step and replays it. The numbers are the same, bit for bit, and steps take less time, especially if their
   * ops are short. The memory of a recorded step stays allocated between steps. Default true.
   */
  readonly record?: boolean | undefined
  /**
   * Ranks that take every step together: see `trainingStep`. Their steps are recorded if the ranks have
   * `allReduceInPlace`.
   */
  readonly ranks?: Ranks | undefined
  /** The shard of the parameters that this rank updates: see `trainingStep`. */
  readonly shard?: ParameterShard | undefined
}

/** Runs the training steps of one model with one optimizer, recorded if possible. */
export class TrainingSteps {
  readonly #model: TrainableModel
  readonly #parameters: readonly NamedParameter[]
  readonly #optimizer: Optimizer
  readonly #clip: number
  readonly #precision: Precision
  readonly #ranks: Ranks | undefined
  readonly #sharded: ShardedUpdate | undefined
  /** What a recording needs; null if steps run op by op. */
  #parts: StepParts | null
  #recorded: RecordedStep | null = null
  readonly #prepared = new WeakMap<TokenBatch, PreparedBatch>()
  /** Kind of the latest step. The first step of a kind always runs op by op: it loads kernels and builds tables. */
  #kind: string | null = null

  /** @param parameters of the model, as `namedParameters` returns them */
  constructor(
    model: TrainableModel,
    parameters: readonly NamedParameter[],
    optimizer: Optimizer,
    options: TrainingStepsOptions = {},
  ) {
    checkOptions('TrainingSteps', options, { clip: true, precision: true, record: true, ranks: true, shard: true })
    const { clip = 1, precision = 'f32', record = true, ranks, shard } = options
    checkPrecision('TrainingSteps', precision)
    this.#model = model
    this.#parameters = parameters
    this.#optimizer = optimizer
    this.#clip = clip
    this.#precision = precision
    this.#ranks = ranks
    this.#sharded = shardedAmong('TrainingSteps', ranks, shard)
    const { staged } = model
    const backend = parameters.at(0)?.parameter.backend
    this.#parts =
      record && areRecordable(ranks) && staged && isStaged(optimizer) && canRecord(backend)
        ? {
            staged,
            optimizer,
            backend,
            clip,
            precision,
            ranks: ranks ?? null,
            sharded: this.#sharded ?? null,
            parameters: parameters.map(({ parameter }) => parameter),
          }
        : null
  }

  /** Whether the latest step was replayed. */
  get replaying(): boolean {
    return this.#recorded !== null
  }

  /**
   * Runs one step on one or more micro-batches: see `trainingStep`.
   *
   * @param options.lr learning rate of this step
   * @param options.step number of the step, for error messages
   * @throws MoeError E_NAN if the loss or gradient norm is not finite; nothing has changed then
   */
  async step(batches: readonly TokenBatch[], options: { lr: number; step?: number }): Promise<StepNumbers> {
    checkOptions('TrainingSteps.step', options, { lr: true, step: true })
    const { lr, step = 0 } = options
    const parts = this.#parts
    if (parts !== null) {
      const staged = this.#stage(parts.staged, batches)
      const kind = kindOf(staged)
      if (!this.#isRecorded(kind) && kind !== null && kind === this.#kind) await this.#record(parts, staged)
      this.#kind = kind
      // Without awaiting anything, so that the replay has been launched when this returns its promise.
      if (this.#recorded !== null) return this.#replay(parts.staged, this.#recorded, staged, lr, step)
    }
    const { shard } = this.#sharded ?? {}
    const settings = { lr, step, clip: this.#clip, precision: this.#precision, ranks: this.#ranks, shard }
    return trainingStep(this.#model, this.#parameters, this.#optimizer, batches, settings)
  }

  /**
   * Prepares the micro-batches of a later step while the device computes. They must not change until then. Optional:
   * otherwise `step` prepares them.
   */
  prepare(batches: readonly TokenBatch[]): void {
    if (this.#parts === null) return
    for (const batch of batches) this.#prepared.set(batch, prepared(this.#parts.staged, batch))
  }

  #stage(staged: StagedStep, batches: readonly TokenBatch[]): StagedBatch[] {
    const { arrays: ofStep, kind } = staged.stepInputs?.() ?? { arrays: {} }
    return batches.map(batch => {
      const ready = this.#prepared.get(batch) ?? prepared(staged, batch)
      this.#prepared.delete(batch)
      return { ...ready, kind, arrays: { ...ready.arrays, ...ofStep } }
    })
  }

  /** Whether there is a valid recording for steps of this kind. Any other recording is disposed. */
  #isRecorded(kind: string | null): boolean {
    if (this.#recorded !== null && kind === this.#kind && this.#recorded.valid) return true
    this.#recorded?.dispose()
    this.#recorded = null
    return false
  }

  async #record(parts: StepParts, batches: readonly StagedBatch[]): Promise<void> {
    // A recording allocates its own memory, so the memory that earlier steps cached would stay unused.
    await parts.backend.trim?.()
    const streams = namedStreams(this.#model).map(({ name, random }) => ({ name, random, before: random.position }))
    try {
      this.#recorded = new RecordedStep(parts, batches[0], batches.length > 1)
      const drawn = streams.find(({ random, before }) => random.position !== before)
      if (drawn) throw drawsWithin(drawn.name)
    } catch (error) {
      if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
      this.#disableRecording()
    }
  }

  /**
   * A recording keeps memory of its own, which steps that run op by op cannot use. So it may need more memory than they
   * do.
   */
  #disableRecording(): void {
    this.dispose()
    this.#parts = null
  }

  async #replay(
    staged: StagedStep,
    recorded: RecordedStep,
    batches: readonly StagedBatch[],
    lr: number,
    step: number,
  ): Promise<StepNumbers> {
    try {
      const own = await recorded.measure(batches)
      const { numbers } = own
      if (!Number.isFinite(numbers.loss) || !Number.isFinite(numbers.gradNorm))
        throw await this.#nonFinite(recorded, step, numbers)
      const measured = await recorded.sumCarried(own)
      if (!(await recorded.apply(measured, lr))) this.#disableRecording()
      return { ...numbers, after: await staged.report(measured.carried) }
    } catch (error) {
      this.dispose()
      throw error
    }
  }

  #nonFinite(recorded: RecordedStep, step: number, numbers: { loss: number; gradNorm: number }): Promise<MoeError> {
    const gradientOf = (parameter: Parameter) => recorded.gradientOf(parameter)
    if (this.#sharded === undefined) return nonFiniteStep(this.#model, step, numbers, gradientOf)
    return nonFiniteStepOnRanks(this.#model, this.#sharded, step, numbers, gradientOf)
  }

  /** Frees the recording. Later steps record again. */
  dispose(): void {
    this.#recorded?.dispose()
    this.#recorded = null
    this.#kind = null
  }
}

/** Every replay would use the random numbers that were drawn while recording. */
const drawsWithin = (name: string) =>
  new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: `the model draws random numbers from ${name} in staged.loss, which every replay would repeat`,
    fix: 'draw in staged.stepInputs and pass the numbers as an input, or leave staged undefined to run steps op by op',
  })

const prepared = (staged: StagedStep, batch: TokenBatch): PreparedBatch => {
  const { rows, length } = batch
  return { rows, length, ...staged.inputs(batch) }
}

const areRecordable = (ranks: Ranks | undefined): ranks is RecordableRanks | undefined =>
  ranks === undefined || ranks.allReduceInPlace !== undefined

const canRecord = (backend: Backend | undefined): backend is Recorder =>
  backend?.capture !== undefined && backend.write !== undefined
