/** @file What a run learns from, step by step: rows of a data set here, texts that the model makes in `../rewards`. */
import type { Precision } from '@moe/core'
import { type Evaluation, evaluate } from '../evaluate.ts'
import { orInterrupted } from '../interrupt.ts'
import type { TokenBatch, TrainableModel } from '../model.ts'
import type { TokenData } from '../options.ts'
import { leftOut, longest } from './examples.ts'
import { namedStreams, sourcesOf } from './mixture.ts'
import type { TokenStream } from './token-stream.ts'
import type { SourceProgress, TrainingOrder } from './training-order.ts'

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
  /** What the first `steps` steps take from each source, where there are several. */
  sources?(steps: number): readonly SourceProgress[]
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
  readonly #validation: TokenData['validation']
  readonly #precision: Precision
  readonly textsPerStep = 0
  readonly stride = 1
  readonly metrics = {}

  constructor(
    model: TrainableModel,
    order: TrainingOrder,
    { validation, precision }: { readonly validation: TokenData['validation']; readonly precision: Precision },
  ) {
    this.#model = model
    this.#order = order
    this.#validation = validation
    this.#precision = precision
  }

  get #sources() {
    return sourcesOf(this.#order.data)
  }

  get identity(): string {
    return this.#sources
      .map(({ name, data, share }) => {
        const own = `${data.length} tokens (${data.digest})`
        return name === '' ? own : `${name} ${share}: ${own}`
      })
      .join(', ')
  }

  get isolate(): boolean {
    return this.#order.isolate
  }

  get trainingTokens(): number {
    return this.#sources.reduce((sum, { data }) => sum + data.length, 0)
  }

  get validationTokens(): number {
    return namedStreams(this.#validation).reduce((sum, [, { length }]) => sum + length, 0)
  }

  tokensOf(step: number): number {
    return this.#order.tokensIn(step + 1) - this.#order.tokensIn(step)
  }

  tokensIn(steps: number): number {
    return this.#order.tokensIn(steps)
  }

  get notices(): string[] {
    const { endTokens } = this.#model
    return this.#sources.flatMap(({ name, data }) => {
      const of = name && `${name}: `
      return [this.#leftOut(data), otherEnds(endTokens, data)].flatMap(text => (text === undefined ? [] : of + text))
    })
  }

  #leftOut(data: TokenStream): string | undefined {
    const { sequenceLength } = this.#order
    const left = leftOut(data, sequenceLength)
    if (left === 0) return undefined
    return `${((100 * left) / data.predictable).toFixed(1)} % of the tokens to learn lie behind the first ${sequenceLength} positions of their conversations and are left out (a sequenceLength of ${longest(data)} holds the longest)`
  }

  epochs(steps: number): number {
    return this.#order.epochs(steps)
  }

  sources(steps: number): readonly SourceProgress[] {
    return this.#order.sources(steps).filter(({ name }) => name !== '')
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
    return orInterrupted(
      options.signal,
      evaluate(this.#model, this.#validation as NonNullable<TokenData['validation']>, how),
    )
  }

  dispose(): void {}
}

/** A text that would end too early or never, told of before the model is trained. */
function otherEnds(ends: readonly number[] | undefined, { end }: TokenStream): string | undefined {
  if (ends === undefined || end === undefined) return undefined
  const where = ends.length === 0 ? 'nowhere' : `at token ${ends.join(' or ')}`
  if (end !== null && !ends.includes(end))
    return `what is learned ends with token ${end}, and what the model generates ends ${where}: make it with eos_token_id: ${end}`
  if (end === null && ends.length > 0)
    return `what is learned has no token at its end, and what the model generates ends ${where}: train the tokenizer with an end token, or make the model with eos_token_id: null`
  return undefined
}
