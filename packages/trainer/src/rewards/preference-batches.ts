/** @file Batches for direct preference optimization (DPO). */
import { MoeError, type Precision, Random } from '@moe/core'
import type { BatchSource, SourceEvaluationOptions } from '../batch-source.ts'
import { EpochOrder } from '../data/epoch-order.ts'
import { tokenNamed } from '../data/token-dataset.ts'
import type { Evaluation } from '../evaluate.ts'
import type { TokenBatch, TrainableModel } from '../model.ts'
import type { RankGroup } from '../rank-group.ts'
import {
  checkReference,
  countOf,
  digestOf,
  lookaheadOf,
  PackedTexts,
  type PromptCompletion,
  type ScoringModel,
  type ScoringModelOnRanks,
  scoresOnRanks,
} from './packed-texts.ts'
import { meanOf, sumOf } from './policy-gradient.ts'
import type { Preference, Preferences } from './preferences.ts'
import { type EncodeOptions, encodePrompts, encoder } from './sampler.ts'

export interface PreferenceBatchesOptions extends EncodeOptions {
  readonly sequenceLength: number
  readonly batchSize: number
  readonly isolate: boolean
  readonly seed: number
  readonly precision: Precision
  /** Each rank learns from `pairs` pairs per step. */
  readonly ranks: RankGroup
  /** The model on ranks, if each has a part of it. */
  readonly onRanks?: ScoringModelOnRanks | undefined
}

/** The chosen text and the rejected text. */
type Pair = readonly [PromptCompletion, PromptCompletion]

/** Log-probabilities of the two texts of a pair under a model: sums over their tokens, in nats. */
export interface PairLogProbs {
  readonly chosen: number
  readonly rejected: number
}

/**
 * The loss of a pair (DPO, eq. 7): -log σ(margin). `chosen` and `rejected` are the implicit rewards of the texts, β times
 * the logarithm of how much likelier the policy finds them than the reference does, and `margin` is their difference.
 * `weight`, β σ(-margin), weights the tokens of the chosen text; those of the rejected text get its negative.
 */
export function pairTerm(now: PairLogProbs, reference: PairLogProbs, beta: number) {
  const chosen = beta * (now.chosen - reference.chosen)
  const rejected = beta * (now.rejected - reference.rejected)
  const margin = chosen - rejected
  // log(1 + exp(-m)) and 1/(1 + exp(m)), without overflow for any m.
  const small = Math.exp(-Math.abs(margin))
  const loss = Math.max(0, -margin) + Math.log1p(small)
  return { chosen, rejected, margin, loss, weight: (beta * (margin > 0 ? small : 1)) / (1 + small) }
}

type PairTerm = ReturnType<typeof pairTerm>

export class PreferenceBatches implements BatchSource {
  readonly #model: TrainableModel
  readonly #data: Preferences
  readonly #options: PreferenceBatchesOptions
  readonly #training: readonly Pair[]
  readonly #validation: readonly Pair[]
  readonly #order: EpochOrder
  /** The step from which this run continues another one, and the pairs before it. */
  #from = { step: 0, rows: 0 }
  #tokens = 0
  metrics: Readonly<Record<string, number>> = {}
  readonly stride = 1
  readonly notices = []

  /** @throws MoeError E_DATA for a text that does not fit into a row */
  constructor(model: TrainableModel, data: Preferences, options: PreferenceBatchesOptions) {
    this.#model = model
    this.#data = data
    this.#options = options
    this.#training = this.#encode(data.training, 'pair')
    this.#validation = this.#encode(data.validation, 'held-out pair')
    this.#order = new EpochOrder(this.#training.length, new Random(options.seed))
    checkReference(model, data.reference, options.onRanks)
  }

  tokensInSteps(): number {
    return 0
  }

  tokensInStep(): number {
    return this.#tokens
  }

  get identity(): string {
    const { beta } = this.#data
    const pairs = this.#pairsPerStep
    return `${this.items} ${JSON.stringify({ pairs, beta })}`
  }

  get items(): string {
    const digest = digestOf(this.#training.flat().flatMap(({ ids, tokens }) => [ids, tokens]))
    return `${this.#training.length} preferences (${digest})`
  }

  get isolate(): boolean {
    return this.#options.isolate
  }

  get trainingTokens(): number {
    return tokensOf(this.#training)
  }

  get validationTokens(): number {
    return tokensOf(this.#validation)
  }

  get textsPerStep(): number {
    return 2 * this.#pairsPerStep
  }

  /** Pairs per step, over all ranks. */
  get #pairsPerStep(): number {
    return this.#data.pairs * this.#options.ranks.size
  }

  epochs(steps: number): number {
    return this.rowsIn(steps) / this.#training.length
  }

  rowsIn(steps: number): number {
    const { step, rows } = this.#from
    return rows + (steps - step) * this.#pairsPerStep
  }

  continueFrom(step: number, rows: number): void {
    this.#from = { step, rows }
  }

  prefetch(): null {
    return null
  }

  async batches(step: number): Promise<TokenBatch[]> {
    const { pairs } = this.#data
    const { ranks, batchSize, sequenceLength } = this.#options
    const first = this.rowsIn(step) + ranks.rank * pairs
    const own = Array.from({ length: pairs }, (_, i) => this.#training[this.#order.at(first + i)])
    const { packed, terms } = await this.#compare(own)
    const tokens = countOf(own.flat().map(({ tokens }) => tokens))
    const gathered = await ranks.gather({ batches: packed.batches.length, tokens, terms })
    const all = gathered.flatMap(({ terms }) => terms)
    const batches = Math.max(...gathered.map(({ batches }) => batches))
    this.#tokens = batches * batchSize * sequenceLength
    this.metrics = {
      preference: meanOf(all.map(({ loss }) => loss)),
      preferred: meanOf(all.map(({ margin }) => Number(margin > 0))),
      margin: meanOf(all.map(({ margin }) => margin)),
      chosen: meanOf(all.map(({ chosen }) => chosen)),
      rejected: meanOf(all.map(({ rejected }) => rejected)),
    }
    // The loss is a mean over tokens, but eq. 7 is a mean over pairs.
    const share = sumOf(gathered.map(({ tokens }) => tokens)) / this.#pairsPerStep
    const weights = own.flatMap((pair, i) =>
      pair.map(({ tokens }, side) => tokens.map(() => (side === 0 ? share : -share) * terms[i].weight)),
    )
    return packed.weighted(weights, batches)
  }

  /** Packs the texts of each pair and compares them. */
  async #compare(pairs: readonly Pair[]) {
    const { sequenceLength, batchSize, isolate, precision, ranks, onRanks } = this.#options
    const { reference, beta } = this.#data
    const lookahead = lookaheadOf(this.#model, reference)
    const packed = new PackedTexts(pairs.flat(), { sequenceLength, lookahead, batchSize, isolate })
    const oddsBy = async (model: ScoringModel) => {
      const sums = (await packed.logProbs(model, precision, ranks)).map(values => values.reduce((sum, x) => sum + x, 0))
      return pairs.map((_, i) => ({ chosen: sums[2 * i], rejected: sums[2 * i + 1] }))
    }
    const [before, now] = [await oddsBy(reference), await oddsBy(onRanks ?? this.#model)]
    return { packed, terms: now.map((odds, i) => pairTerm(odds, before[i], beta)) }
  }

  async evaluate({ signal, onProgress }: SourceEvaluationOptions): Promise<Evaluation | null> {
    const started = performance.now()
    const { ranks, onRanks } = this.#options
    const { from, to } = ranks.share(this.#validation.length)
    const own = this.#validation.slice(from, to)
    const { pairs } = this.#data
    const termsOf = async (at: number) => {
      const { terms } = await this.#compare(own.slice(at, at + pairs))
      onProgress(Math.min(1, (at + pairs) / own.length))
      return terms
    }
    const alone = () =>
      ranks.all(signal, async () => {
        const terms: PairTerm[] = []
        for (let at = 0; at < own.length; at += pairs) {
          signal.throwIfAborted()
          terms.push(...(await termsOf(at)))
        }
        return terms
      })
    const together = async () => {
      const terms: PairTerm[] = []
      // All make equally many passes; shares differ by a pair.
      for (let at = 0; at < Math.ceil(this.#validation.length / ranks.size); at += pairs) {
        if ((await ranks.gather(signal.aborted)).includes(true)) return null
        terms.push(...(await termsOf(at)))
      }
      return (await ranks.gather(terms)).flat()
    }
    const isTogether = scoresOnRanks(onRanks ?? this.#model, this.#data.reference)
    const terms = await (isTogether ? together() : alone())
    if (terms === null) return null
    return {
      loss: meanOf(terms.map(({ loss }) => loss)),
      bitsPerByte: Number.NaN,
      tokens: countOf(this.#validation.flat().map(({ tokens }) => tokens)),
      seconds: (performance.now() - started) / 1000,
      preferred: meanOf(terms.map(({ margin }) => Number(margin > 0))),
    }
  }

  #encode(pairs: readonly Preference[], what: string): Pair[] {
    const { sequenceLength, tokenizer } = this.#options
    const { template } = this.#data
    const prompts = encodePrompts(pairs, template, this.#options)
    const encode = encoder(tokenizer)
    const end = tokenizer === undefined ? null : tokenNamed(tokenizer, 'end')
    const complete = (pair: Preference, text: string | ArrayLike<number>): number[] => {
      if (typeof text !== 'string') return Array.from(text)
      if ('messages' in pair && template) {
        const prompt = template.render(pair.messages, { addGenerationPrompt: true })
        const answer = { role: 'assistant', content: text }
        const whole = template.render([...pair.messages, answer], { addGenerationPrompt: false })
        if (whole.startsWith(prompt)) return encode(whole.slice(prompt.length), true)
        throw refused(
          `the template does not render the answer of a ${what} directly after its generation prompt`,
          'use another template',
        )
      }
      return [...encode(text, false), ...(end === null ? [] : [end])]
    }
    return pairs.map((pair, i) => {
      const ids = prompts[i]
      const texts = [complete(pair, pair.chosen), complete(pair, pair.rejected)].map(tokens => ({ ids, tokens }))
      const longest = Math.max(...texts.map(({ tokens }) => ids.length + tokens.length - 1))
      if (longest <= sequenceLength && ids.length > 0) return texts as unknown as Pair
      const problem = ids.length === 0 ? 'has no prompt' : `does not fit into a row of ${sequenceLength}`
      throw refused(`${what} ${i} ${problem}`, `pass a sequenceLength of ${longest}, or leave out the pair`)
    })
  }

  dispose(): void {}
}

const tokensOf = (pairs: readonly Pair[]) => countOf(pairs.flat().flatMap(({ ids, tokens }) => [ids, tokens]))

const refused = (problem: string, fix: string) => new MoeError({ code: 'E_DATA', op: 'train', problem, fix })
