/** @file What a run learns from, step by step: rows of a data set here, texts that the model makes in `../rewards`. */
import type { Precision } from '@moe/core'
import { type Evaluation, evaluate } from '../evaluate.ts'
import { orInterrupted } from '../interrupt.ts'
import type { TokenBatch, TrainableModel } from '../model.ts'
import type { TokenDataset } from './token-dataset.ts'
import type { TrainingOrder } from './training-order.ts'

/** How a measurement is told of, and ended. */
export interface MeasureOptions {
  /** Tokens to measure on. Default: all. */
  readonly limit: number | undefined
  readonly signal: AbortSignal
  readonly onProgress: (done: number) => void
}

export interface Lessons {
  /** What they are made of: runs that go on have the same. */
  readonly identity: string
  /** Whether texts that share a row are kept apart. */
  readonly isolate: boolean
  /** Tokens of the data that is trained on. */
  readonly trainingTokens: number
  /** Tokens of what is held out; 0 without any. */
  readonly validationTokens: number
  /** Texts that the model makes for a step, on all ranks; 0 where they are there. */
  readonly textsPerStep: number
  /** Positions of a step (counted from 0) on this rank; where that depends on texts that the model makes, of the latest. */
  tokensOf(step: number): number
  /** Positions of the first `steps` steps on this rank; 0 where that is not known beforehand. */
  tokensIn(steps: number): number
  /** Steps that belong together: a run stops, saves and measures behind whole ones. */
  readonly stride: number
  /** To be logged with the step whose batches were asked for last. */
  readonly metrics: Readonly<Record<string, number>>
  /** What the user should know as the run begins. */
  readonly notices: readonly string[]
  epochs(steps: number): number
  /** The micro-batches of a step (counted from 0), for the model as it is then; null when they were interrupted, be it on another rank. */
  step(step: number): readonly TokenBatch[] | Promise<readonly TokenBatch[] | null>
  /** The same before the model is there; null where its batches depend on it. */
  ahead(step: number): readonly TokenBatch[] | null
  /** Of held-out data, where there is some; null when it was interrupted. */
  measure(options: MeasureOptions): Promise<Evaluation | null>
  dispose(): void
}

/** Rows of a data set. */
export class DatasetLessons implements Lessons {
  readonly #model: TrainableModel
  readonly #order: TrainingOrder
  readonly #validation: TokenDataset | undefined
  readonly #precision: Precision
  readonly textsPerStep = 0
  readonly stride = 1
  readonly metrics = {}

  constructor(
    model: TrainableModel,
    order: TrainingOrder,
    { validation, precision }: { readonly validation: TokenDataset | undefined; readonly precision: Precision },
  ) {
    this.#model = model
    this.#order = order
    this.#validation = validation
    this.#precision = precision
  }

  get identity(): string {
    const { tokens, digest } = this.#order.data
    return `${tokens.length} tokens (${digest})`
  }

  get isolate(): boolean {
    return this.#order.isolate
  }

  get trainingTokens(): number {
    return this.#order.data.tokens.length
  }

  get validationTokens(): number {
    return this.#validation?.tokens.length ?? 0
  }

  tokensOf(step: number): number {
    return this.#order.tokensIn(step + 1) - this.#order.tokensIn(step)
  }

  tokensIn(steps: number): number {
    return this.#order.tokensIn(steps)
  }

  get notices(): string[] {
    return [this.#leftOut(), otherEnds(this.#model.endTokens, this.#order.data)].filter(text => text !== undefined)
  }

  #leftOut(): string | undefined {
    const { data, sequenceLength } = this.#order
    const left = data.leftOut(sequenceLength)
    if (left === 0) return undefined
    return `${((100 * left) / data.predictable).toFixed(1)} % of the tokens to learn lie behind the first ${sequenceLength} positions of their conversations and are left out (a sequenceLength of ${data.longest} holds the longest)`
  }

  epochs(steps: number): number {
    return this.#order.epochs(steps)
  }

  step(step: number): TokenBatch[] {
    return this.#order.step(step)
  }

  ahead(step: number): TokenBatch[] {
    return this.#order.step(step)
  }

  measure(options: MeasureOptions): Promise<Evaluation | null> {
    const { sequenceLength, batchSize, isolate } = this.#order
    const how = { sequenceLength, batchSize, isolate, precision: this.#precision, ...options }
    return orInterrupted(options.signal, evaluate(this.#model, this.#validation as TokenDataset, how))
  }

  dispose(): void {}
}

/** A text that would end too early or never, told of before the model is trained. */
function otherEnds(ends: readonly number[] | undefined, { end }: TokenDataset): string | undefined {
  if (ends === undefined || end === undefined) return undefined
  const where = ends.length === 0 ? 'nowhere' : `at token ${ends.join(' or ')}`
  if (end !== null && !ends.includes(end))
    return `what is learned ends with token ${end}, and what the model generates ends ${where}: make it with eos_token_id: ${end}`
  if (end === null && ends.length > 0)
    return `what is learned has no token at its end, and what the model generates ends ${where}: train the tokenizer with an end token, or make the model with eos_token_id: null`
  return undefined
}
