/** @file The steps of a run: op by op, or recorded and replayed where backend, model and optimizer can. */
import { type Backend, isMoeError, type NamedParameter, type Precision } from '@moe/core'
import type { TokenBatch, TrainableModel } from './model.ts'
import { nonFiniteStep } from './non-finite.ts'
import { isStaged, type Optimizer } from './optim/optimizer.ts'
import { kindOf, RecordedStep, type Recorder, type StagedBatch, type StepParts } from './recorded-step.ts'
import type { StepNumbers } from './step-numbers.ts'
import { trainingStep } from './training-step.ts'

export interface TrainingStepsOptions {
  /** Largest norm over all gradients. Default 1; Infinity for none. */
  readonly clip?: number
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
  /**
   * Record a step and replay it. The numbers are the same, bit for bit, and the step takes less time, most of all where
   * its ops are short; memory that it needs stays taken between steps. Default true.
   */
  readonly record?: boolean
}

/** Steps of one model with one optimizer. */
export class TrainingSteps {
  readonly #model: TrainableModel
  readonly #parameters: readonly NamedParameter[]
  readonly #optimizer: Optimizer
  readonly #clip: number
  readonly #precision: Precision
  /** What a recording needs; null where steps go op by op. */
  #parts: StepParts | null
  #recorded: RecordedStep | null = null
  /** Of the latest step. The first one of a kind runs op by op: kernels are loaded, tables are made. */
  #kind: string | null = null

  /** @param parameters of the model, as `namedParameters` gives them */
  constructor(
    model: TrainableModel,
    parameters: readonly NamedParameter[],
    optimizer: Optimizer,
    options: TrainingStepsOptions = {},
  ) {
    const { clip = 1, precision = 'f32', record = true } = options
    this.#model = model
    this.#parameters = parameters
    this.#optimizer = optimizer
    this.#clip = clip
    this.#precision = precision
    const { staged } = model
    const backend = parameters.at(0)?.parameter.backend
    this.#parts =
      record && staged && isStaged(optimizer) && canRecord(backend)
        ? { staged, optimizer, backend, clip, precision, parameters: parameters.map(({ parameter }) => parameter) }
        : null
  }

  /** Whether the latest step was replayed. */
  get replaying(): boolean {
    return this.#recorded !== null
  }

  /**
   * One step on one or more micro-batches: see `trainingStep`.
   * @param options.step its number, for error messages
   * @throws MoeError E_NAN; nothing has changed then
   */
  async step(batches: readonly TokenBatch[], options: { lr: number; step?: number }): Promise<StepNumbers> {
    const { lr, step = 0 } = options
    const parts = this.#parts
    if (parts !== null) {
      const staged = batches.map(batch => ({ ...batch, ...parts.staged.inputs(batch) }))
      if (await this.#ready(parts, staged)) return this.#replay(parts, staged, lr, step)
    }
    const settings = { lr, step, clip: this.#clip, precision: this.#precision }
    return trainingStep(this.#model, this.#parameters, this.#optimizer, batches, settings)
  }

  /** Sees to it that a graph for these batches is there, or says that they go op by op. */
  async #ready(parts: StepParts, batches: readonly StagedBatch[]): Promise<boolean> {
    const kind = kindOf(batches)
    const same = kind !== null && kind === this.#kind
    if (!same || !this.#recorded?.valid) this.dispose()
    this.#kind = kind
    if (!same) return false
    if (this.#recorded === null) {
      // A graph has memory of its own: what the steps before it used would only lie idle.
      await parts.backend.trim?.()
      try {
        this.#recorded = new RecordedStep(parts, batches[0], batches.length > 1)
      } catch (error) {
        if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
        // Its memory is cut into pieces by itself, so it may need a little more than a step op by op.
        this.#parts = null
        return false
      }
    }
    return true
  }

  async #replay(parts: StepParts, batches: readonly StagedBatch[], lr: number, step: number): Promise<StepNumbers> {
    const recorded = this.#recorded as RecordedStep
    try {
      const measured = await recorded.measure(batches)
      const { numbers, carried } = measured
      if (!Number.isFinite(numbers.loss) || !Number.isFinite(numbers.gradNorm))
        throw await nonFiniteStep(this.#model, step, numbers)
      recorded.apply(measured, lr)
      return { ...numbers, after: await parts.staged.report(carried) }
    } catch (error) {
      this.dispose()
      throw error
    }
  }

  /** Gives the graphs back. Later steps begin anew. */
  dispose(): void {
    this.#recorded?.dispose()
    this.#recorded = null
    this.#kind = null
  }
}

const canRecord = (backend: Backend | undefined): backend is Recorder =>
  backend?.capture !== undefined && backend.write !== undefined
