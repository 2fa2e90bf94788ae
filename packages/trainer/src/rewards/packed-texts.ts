/** @file Prompts and the texts behind them as batches of rows: log-probabilities are read from these, weights are written to them. */
import { createHash } from 'node:crypto'
import { eventLoopTurn, MoeError, noGrad, type Precision, scope, withPrecision } from '@moe/core'
import { checkedLoss } from '../check-model.ts'
import { endFrom } from '../data/examples.ts'
import { batchOf, paddingBatch, type Row, rowsOf } from '../data/rows.ts'
import { TokenDataset } from '../data/token-dataset.ts'
import type { TokenBatch, TrainableModel } from '../model.ts'

/** A prompt, and what follows it. */
export interface PromptCompletion {
  /** Ids of the prompt: at least one. */
  readonly ids: readonly number[]
  /** Ids behind it: at least one. */
  readonly tokens: readonly number[]
}

export interface PackOptions {
  readonly sequenceLength: number
  readonly lookahead: number
  readonly batchSize: number
  /** Whether several texts share a row. */
  readonly isolate: boolean
}

/** Texts, be there none, in micro-batches of one shape, the last filled up with rows of padding. Each text is learned behind its prompt, and fits into a row. */
export class PackedTexts {
  readonly batches: readonly TokenBatch[]
  /** Of each text, the batch and the place in it of its first token behind the prompt. */
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
        learned: [...ids.map(() => false), ...tokens.map(() => true)],
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

  /** Log-probability of every token of every text in nats, as the training pass of a model has it, whose lookahead is no larger than that of the rows. */
  async logProbs(model: TrainableModel, precision: Precision): Promise<Float32Array[]> {
    const read: Float32Array[] = []
    for (const batch of this.batches) {
      const { nlls } = scope(() =>
        noGrad(() =>
          withPrecision(precision, () => {
            const { nlls } = checkedLoss(model.loss(batch, { training: false }))
            return { nlls }
          }),
        ),
      )
      if (nlls === undefined) throw tellsNothing()
      try {
        read.push((await nlls.values()) as Float32Array)
      } finally {
        nlls.dispose()
      }
      await eventLoopTurn()
    }
    return this.#places.map(({ batch, at, length: count }) => {
      const { rows, length } = this.batches[batch]
      const row = Math.floor(at / length)
      // The token at a place is predicted one position before.
      const from = (row * read[batch].length) / rows + (at % length) - 1
      return read[batch].subarray(from, from + count).map(nll => -nll)
    })
  }

  /**
   * The batches with a weight for every token of every text, 0 for all others.
   * @param count of batches, as another rank may have more: those behind the last are padding
   */
  weighted(weights: ReadonlyArray<ArrayLike<number>>, count = this.batches.length): TokenBatch[] {
    const { sequenceLength, lookahead, batchSize, isolate } = this.#options
    const padding = Array.from({ length: count - this.batches.length }, () =>
      paddingBatch(batchSize, sequenceLength + lookahead, isolate),
    )
    const batches = [...this.batches, ...padding]
    const arrays = batches.map(({ tokens }) => new Float32Array(tokens.length))
    for (const [text, { batch, at }] of this.#places.entries()) arrays[batch].set(weights[text], at)
    return batches.map((batch, i) => ({ ...batch, weights: arrays[i] }))
  }
}

/** Rows for two models have what either needs beyond the positions that are trained on. */
export const lookaheadOf = (model: TrainableModel, reference: TrainableModel | undefined): number =>
  Math.max(model.lookahead, reference?.lookahead ?? 0)

/** @throws MoeError E_CONFIG */
export function checkReference(model: TrainableModel, reference: TrainableModel | undefined): void {
  if (model !== reference) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: 'the reference is the model itself, from which it never differs',
    fix: 'open another one from the same folder',
  })
}

/** Identity of lists of ids, for checkpoints. */
export function digestOf(lists: ReadonlyArray<readonly number[]>): string {
  const hash = createHash('sha256')
  for (const ids of lists) hash.update(Int32Array.from([ids.length, ...ids]))
  return hash.digest('hex').slice(0, 16)
}

export const countOf = (lists: ReadonlyArray<ArrayLike<number>>): number =>
  lists.reduce((sum, { length }) => sum + length, 0)

const tellsNothing = () =>
  new MoeError({
    code: 'E_ATTR',
    op: 'loss',
    problem: 'the model does not tell how likely it finds each token',
    fix: 'multiply the likelihoods by TokenBatch.weights where it has some, and return them in nlls: [rows * positions], detached',
  })
