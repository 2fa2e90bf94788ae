/** @file Micro-batches from a data set, or from a mixture of them. */
import type { Precision } from '@moe/core'
import type { BatchSource, SourceEvaluationOptions } from './batch-source.ts'
import { longestExample, truncatedTokens } from './data/examples.ts'
import { namedStreams, sourcesOf, type TokenData } from './data/token-data.ts'
import type { TokenStream } from './data/token-stream.ts'
import type { SourceProgress, TrainingOrder } from './data/training-order.ts'
import { type Evaluation, evaluateOnRanks } from './evaluate.ts'
import type { TokenBatch, TrainableModel } from './model.ts'
import type { ModelOnRanks } from './model-on-ranks.ts'
import type { RankGroup } from './rank-group.ts'

interface DatasetOptions {
  readonly validation: TokenData['validation']
  readonly precision: Precision
  /** Maximum number of held-out tokens of the final evaluation. */
  readonly finalTokens: number
  /** Each rank evaluates its share. */
  readonly ranks: RankGroup
  /** The model on ranks, if each has a part of it. */
  readonly onRanks?: ModelOnRanks | undefined
}

/** Rows of a data set in the order of a `TrainingOrder`. */
export class DatasetBatches implements BatchSource {
  readonly #model: TrainableModel
  readonly #order: TrainingOrder
  readonly #validation: TokenData['validation']
  readonly #precision: Precision
  readonly #finalTokens: number
  readonly #ranks: RankGroup
  readonly #onRanks: ModelOnRanks | undefined
  readonly textsPerStep = 0
  readonly stride = 1
  readonly metrics = {}

  constructor(
    model: TrainableModel,
    order: TrainingOrder,
    { validation, precision, finalTokens, ranks, onRanks }: DatasetOptions,
  ) {
    this.#model = model
    this.#order = order
    this.#validation = validation
    this.#precision = precision
    this.#finalTokens = finalTokens
    this.#ranks = ranks
    this.#onRanks = onRanks
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

  tokensInStep(step: number): number {
    return this.#order.tokensIn(step + 1) - this.#order.tokensIn(step)
  }

  tokensInSteps(steps: number): number {
    return this.#order.tokensIn(steps)
  }

  get notices(): string[] {
    const { endTokens } = this.#model
    const ofSources = this.#sources.flatMap(({ name, data }) => {
      const prefix = name && `${name}: `
      return [this.#truncation(data), endTokenMismatch(endTokens, data)].flatMap(text =>
        text === undefined ? [] : prefix + text,
      )
    })
    return [...ofSources, ...[this.#repetition, this.#unusedValidation].flatMap(text => text ?? [])]
  }

  /** A warning if one step contains the data more than once. */
  get #repetition(): string | undefined {
    const times = this.epochs(1) - this.epochs(0)
    if (times <= 1) return undefined
    return `each step uses the training data ${times.toFixed(1)} times: use a smaller batchSize, or more data`
  }

  get #unusedValidation(): string | undefined {
    const streams = namedStreams(this.#validation)
    const share = this.#finalTokens / streams.length
    const used = streams.reduce((sum, [, { length }]) => sum + Math.min(length, share), 0)
    if (used >= this.validationTokens) return undefined
    const [some, all] = [used, this.validationTokens].map(count => Math.floor(count).toLocaleString('en-US'))
    return `the final evaluation uses about ${some} of ${all} held-out tokens, spread evenly over them (to use all, pass evalTokens: Infinity)`
  }

  #truncation(data: TokenStream): string | undefined {
    const { sequenceLength } = this.#order
    const truncated = truncatedTokens(data, sequenceLength)
    if (truncated === 0) return undefined
    return `${((100 * truncated) / data.predictable).toFixed(1)} % of the tokens to learn are truncated: they come after the first ${sequenceLength} positions of their conversations (the longest needs a sequenceLength of ${longestExample(data)})`
  }

  epochs(steps: number): number {
    return this.#order.epochs(steps)
  }

  rowsIn(steps: number): number {
    return this.#order.windowsIn(steps)
  }

  continueFrom(step: number, rows: number): void {
    this.#order.continueFrom(step, rows)
  }

  sources(steps: number): readonly SourceProgress[] {
    return this.#order.sources(steps).filter(({ name }) => name !== '')
  }

  batches(step: number): TokenBatch[] {
    return this.#order.step(step)
  }

  prefetch(step: number): TokenBatch[] {
    return this.#order.step(step)
  }

  evaluate(options: SourceEvaluationOptions): Promise<Evaluation | null> {
    const { sequenceLength, batchSize, isolate } = this.#order
    const sizes = { sequenceLength, batchSize, isolate, precision: this.#precision }
    const settings = { ...sizes, ranks: this.#ranks, onRanks: this.#onRanks, ...options }
    return evaluateOnRanks(this.#model, namedStreams(this.#validation), settings)
  }

  dispose(): void {}
}

/** A warning if generated text would end at another token than the training texts do, and so too early or never. */
function endTokenMismatch(ends: readonly number[] | undefined, { end }: TokenStream): string | undefined {
  if (ends === undefined || end === undefined) return undefined
  const where = ends.length === 0 ? 'at no token' : `at token ${ends.join(' or ')}`
  if (end !== null && !ends.includes(end))
    return `training texts end with token ${end}, but generation stops ${where}: create the model with eos_token_id: ${end}`
  if (end === null && ends.length > 0)
    return `training texts have no end token, but generation stops ${where}: train the tokenizer with an end token, or create the model with eos_token_id: null`
  return undefined
}
