/** @file Packs prompts with their completions into batches, to read log-probabilities and to assign weights. */
import { createHash } from 'node:crypto'
import { MoeError, noGrad, type Precision, scope, withPrecision, yieldToEventLoop } from '@moe/core'
import { checkedLoss } from '../check-model.ts'
import { endFrom } from '../data/examples.ts'
import { batchOf, paddingBatch, type Row, rowsOf } from '../data/rows.ts'
import { TokenDataset } from '../data/token-dataset.ts'
import type { TokenBatch, TrainableModel } from '../model.ts'
import type { ModelOnRanks } from '../model-on-ranks.ts'
import { RankGroup } from '../rank-group.ts'

/** A prompt with its completion. */
export interface PromptCompletion {
  /** Ids of the prompt; at least one. */
  readonly ids: readonly number[]
  /** Ids of the completion; at least one. */
  readonly tokens: readonly number[]
}

export interface PackOptions {
  readonly sequenceLength: number
  readonly lookahead: number
  readonly batchSize: number
  /** Whether several texts are packed into a row. */
  readonly isolate: boolean
}

/**
 * Texts in micro-batches of equal shape; the last one is filled up with padding rows. Only completions are learned.
 * Each text must fit into a row. There may be no texts.
 */
export class PackedTexts {
  readonly batches: readonly TokenBatch[]
  /** For each text, the batch and the position in it of its first completion token. */
  readonly #places: ReadonlyArray<{ readonly batch: number; readonly at: number; readonly length: number }>
  readonly #options: PackOptions

  constructor(texts: readonly PromptCompletion[], options: PackOptions) {
    this.#options = options
    if (texts.length === 0) {
      this.batches = []
      this.#places = []
      return
    }
    const { sequenceLength, lookahead, batchSize, isolate } = options
    const data = TokenDataset.fromExamples(
      texts.map(({ ids, tokens }) => ({
        tokens: [...ids, ...tokens],
        lossMask: [...ids.map(() => false), ...tokens.map(() => true)],
      })),
    )
    const examples = data.examples as Int32Array
    const textAt = new Map(Array.from(examples, (start, text) => [start, text]))
    const rows = rowsOf(data, sequenceLength, isolate)
    const count = Math.ceil(rows.count / batchSize)
    const places: Array<{ batch: number; at: number; length: number }> = []
    const length = sequenceLength + lookahead
    this.batches = Array.from({ length: count }, (_, batch) => {
      const own = Array.from({ length: batchSize }, (_, i): Row => {
        const row = batch * batchSize + i
        return row < rows.count ? rows.row(row) : []
      })
      own.forEach((row, r) => {
        let at = r * length
        for (const start of row) {
          const text = textAt.get(start) as number
          places[text] = { batch, at: at + texts[text].ids.length, length: texts[text].tokens.length }
          at += endFrom(data, start) - start
        }
      })
      return batchOf(data, own, length, isolate)
    })
    this.#places = places
  }

  /**
   * Returns the log-probability of every completion token in nats, as in the training pass of `model`, whose lookahead
   * must not exceed that of the rows. If the model is on ranks, all ranks call it.
   */
  async logProbs(model: ScoringModel, precision: Precision, ranks = new RankGroup()): Promise<Float32Array[]> {
    const read = isOnRanks(model)
      ? await model.nlls(this.#padded(await this.batchesOfAny(ranks)), { precision })
      : await nllsOf(model, this.batches, precision)
    return this.#places.map(({ batch, at, length: count }) => {
      const { rows, length } = this.batches[batch]
      const row = Math.floor(at / length)
      // A token is predicted one position earlier.
      const from = (row * read[batch].length) / rows + (at % length) - 1
      return read[batch].subarray(from, from + count).map(nll => -nll)
    })
  }

  /**
   * Returns the batches with a weight for every completion token, and 0 for all other tokens.
   *
   * @param count number of batches; those after the last are padding, if another rank has more
   */
  weighted(weights: ReadonlyArray<ArrayLike<number>>, count = this.batches.length): TokenBatch[] {
    const batches = this.#padded(count)
    const arrays = batches.map(({ tokens }) => new Float32Array(tokens.length))
    for (const [text, { batch, at }] of this.#places.entries()) arrays[batch].set(weights[text], at)
    return batches.map((batch, i) => ({ ...batch, weights: arrays[i] }))
  }

  /** The largest number of batches that any rank has. */
  async batchesOfAny(ranks: RankGroup): Promise<number> {
    return Math.max(...(await ranks.gather(this.batches.length)))
  }

  #padded(count: number): TokenBatch[] {
    const { sequenceLength, lookahead, batchSize, isolate } = this.#options
    const padding = Array.from({ length: count - this.batches.length }, () =>
      paddingBatch(batchSize, sequenceLength + lookahead, isolate),
    )
    return [...this.batches, ...padding]
  }
}

/** A model on ranks that scores texts, such as an `ExpertParallel`. */
export type ScoringModelOnRanks = ModelOnRanks & Required<Pick<ModelOnRanks, 'nlls'>>

/** A model that scores texts: a whole one, or one on ranks. */
export type ScoringModel = TrainableModel | ScoringModelOnRanks

const isOnRanks = (model: ScoringModel): model is ScoringModelOnRanks =>
  'nlls' in model && typeof model.nlls === 'function'

/** Whether it is a model that can score texts. */
export const canScore = (model: ScoringModel | undefined): boolean =>
  model !== undefined && (isOnRanks(model) || typeof model?.loss === 'function')

/** Whether all ranks take part in scoring by any of the models. */
export const scoresOnRanks = (...models: readonly ScoringModel[]): boolean => models.some(isOnRanks)

async function nllsOf(
  model: TrainableModel,
  batches: readonly TokenBatch[],
  precision: Precision,
): Promise<Float32Array[]> {
  const read: Float32Array[] = []
  for (const batch of batches) {
    const { nlls } = scope(() =>
      noGrad(() =>
        withPrecision(precision, () => {
          const { nlls } = checkedLoss(model.loss(batch, { training: false }))
          return { nlls }
        }),
      ),
    )
    if (nlls === undefined) throw missingNlls()
    try {
      read.push((await nlls.values()) as Float32Array)
    } finally {
      nlls.dispose()
    }
    await yieldToEventLoop()
  }
  return read
}

/** The lookahead that rows need for both models. */
export const lookaheadOf = (model: TrainableModel, reference: ScoringModel | undefined): number =>
  Math.max(model.lookahead, reference?.lookahead ?? 0)

/** @throws MoeError E_CONFIG */
export function checkReference(
  model: TrainableModel,
  reference: ScoringModel | undefined,
  onRanks: ModelOnRanks | undefined,
): void {
  if (reference === undefined || (model !== reference && onRanks !== reference)) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: 'the reference is the trained model itself, so they would never differ',
    fix: 'load a second copy of the model',
  })
}

/** Digest of lists of ids, for checkpoints. */
export function digestOf(lists: ReadonlyArray<readonly number[]>): string {
  const hash = createHash('sha256')
  for (const ids of lists) hash.update(Int32Array.from([ids.length, ...ids]))
  return hash.digest('hex').slice(0, 16)
}

export const countOf = (lists: ReadonlyArray<ArrayLike<number>>): number =>
  lists.reduce((sum, { length }) => sum + length, 0)

const missingNlls = () =>
  new MoeError({
    code: 'E_ATTR',
    op: 'loss',
    problem: 'the model does not return the likelihood of each token',
    fix: 'return nlls, [rows * positions] and detached, and multiply the likelihoods by TokenBatch.weights if given',
  })
