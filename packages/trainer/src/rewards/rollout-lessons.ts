/** @file Steps that learn from texts that the model makes: sampled, rewarded, compared within their groups, and learned from in one step or several. */
import { MoeError, type Precision } from '@moe/core'
import { EndlessOrder } from '../data/endless-order.ts'
import type { Lessons, MeasureOptions } from '../data/lessons.ts'
import type { Evaluation } from '../evaluate.ts'
import type { TextTokenizer, TokenBatch } from '../model.ts'
import { measureRewards } from './evaluate-rewards.ts'
import { checkReference, countOf, digestOf, lookaheadOf, PlacedTexts } from './placed-texts.ts'
import { advantagesOf, deviationOf, divergence, meanOf, type TextCounts, weigh } from './policy-gradient.ts'
import type { Rollouts } from './rollouts.ts'
import { encodePrompts, type SamplingModel, sampleRewarded, seedOf, type TextSampler } from './sampler.ts'

export interface RolloutLessonsOptions {
  readonly tokenizer: TextTokenizer | undefined
  readonly bos: number | null | undefined
  readonly sequenceLength: number
  readonly batchSize: number
  readonly isolate: boolean
  readonly seed: number
  readonly precision: Precision
  readonly signal: AbortSignal
}

/** Texts that were made for some steps, and what is learned from them. */
interface Made {
  readonly number: number
  /** Of all texts, also of those that teach nothing. */
  readonly all: TextCounts
  readonly placed: PlacedTexts
  readonly advantages: readonly number[]
  /** Of every token, by the weights that made it, as the training pass has it. */
  readonly old: readonly Float32Array[]
  readonly reference: readonly Float32Array[] | undefined
  readonly metrics: Readonly<Record<string, number>>
}

export class RolloutLessons implements Lessons {
  readonly #model: SamplingModel
  readonly #data: Rollouts
  readonly #options: RolloutLessonsOptions
  readonly #training: readonly number[][]
  readonly #validation: readonly number[][]
  #sampler: TextSampler | null = null
  #made: Made | null = null
  readonly #order: EndlessOrder
  metrics: Readonly<Record<string, number>> = {}
  readonly notices = []

  /** @throws MoeError E_DATA for a prompt that leaves no room for a text in a row */
  constructor(model: SamplingModel, data: Rollouts, options: RolloutLessonsOptions) {
    this.#model = model
    this.#data = data
    this.#options = options
    this.#training = encodePrompts(data.training, data.template, options)
    this.#validation = encodePrompts(data.validation, data.template, options)
    this.#order = new EndlessOrder(this.#training.length, options.seed)
    checkReference(model, data.kl?.reference)
    this.#checkRoom(this.#training, 'prompt')
    this.#checkRoom(this.#validation, 'held-out prompt')
  }

  get identity(): string {
    const { groups, groupSize, maxTokens, updates, clip, kl, average, maxTexts } = this.#data
    const how = { groups, groupSize, maxTokens, updates, clip, kl: kl?.weight, average, maxTexts }
    return `${this.#training.length} prompts (${digestOf(this.#training)}) ${JSON.stringify(how)}`
  }

  get isolate(): boolean {
    return this.#options.isolate
  }

  get trainingTokens(): number {
    return countOf(this.#training)
  }

  get validationTokens(): number {
    return countOf(this.#validation)
  }

  get textsPerStep(): number {
    return this.#data.groups * this.#data.groupSize
  }

  get tokensPerStep(): number {
    return this.#made?.placed.positions ?? 0
  }

  get stride(): number {
    return this.#data.updates
  }

  epochs(steps: number): number {
    return ((steps / this.#data.updates) * this.#data.groups) / this.#training.length
  }

  ahead(): null {
    return null
  }

  async step(step: number): Promise<TokenBatch[]> {
    const { updates, clip, kl, average } = this.#data
    const number = Math.floor(step / updates)
    const made = this.#made?.number === number ? this.#made : await this.#make(number)
    this.#made = made
    const { all, placed, advantages, old, reference } = made
    const now = step % updates === 0 ? old : await this.#logProbs(placed)
    const odds = advantages.map((advantage, i) => ({
      advantage,
      now: now[i],
      old: old[i],
      reference: reference?.[i],
    }))
    const how = { clip, klWeight: kl?.weight ?? 0, average }
    const { weights, objective, clipped, kl: divergence } = weigh(odds, how, all)
    this.metrics = { ...made.metrics, objective, clipped, ...(kl && { kl: divergence }) }
    return placed.weighted(weights)
  }

  async #make(number: number): Promise<Made> {
    const { groups, groupSize, kl } = this.#data
    const started = performance.now()
    const tasks = Array.from({ length: groups * groupSize }, (_, i) => {
      const prompt = this.#order.at(number * groups + Math.floor(i / groupSize))
      return {
        prompt: this.#data.training[prompt],
        ids: this.#training[prompt],
        seed: seedOf(this.#options.seed, 'rollouts', number, i),
      }
    })
    const { tokenizer, signal } = this.#options
    const { reward, maxTokens } = this.#data
    const texts = await sampleRewarded(this.#needSampler(), tasks, { reward, maxTokens, tokenizer, signal })
    const samplingSeconds = (performance.now() - started) / 1000
    const { sequenceLength, batchSize, isolate } = this.#options
    const lookahead = lookaheadOf(this.#model, kl?.reference)
    const byGroup = Array.from({ length: groups }, (_, g) =>
      texts.slice(g * groupSize, (g + 1) * groupSize).map(({ reward }) => reward),
    )
    const advantages = byGroup.map(advantagesOf)
    const isFlat = (group: readonly number[]) => group.every(advantage => advantage === 0)
    const flat = advantages.filter(isFlat).length
    // Groups that teach nothing need not be read, unless they are to stay near the reference.
    const all = kl !== undefined || flat === groups
    const isLearned = (_: unknown, i: number) => all || !isFlat(advantages[Math.floor(i / groupSize)])
    const learned = texts.filter(isLearned)
    const placed = new PlacedTexts(learned, { sequenceLength, lookahead, batchSize, isolate })
    const old = await this.#logProbs(placed)
    const drift = learned.flatMap(({ logProbs }, i) => logProbs.map((logProb, t) => divergence(logProb - old[i][t])))
    return {
      number,
      all: { texts: texts.length, tokens: countOf(texts.map(({ tokens }) => tokens)) },
      placed,
      advantages: advantages.flat().filter(isLearned),
      old,
      reference: kl && (await placed.logProbs(kl.reference, this.#options.precision)),
      metrics: {
        reward: meanOf(texts.map(({ reward }) => reward)),
        rewardStd: meanOf(byGroup.map(deviationOf)),
        flatGroups: flat / groups,
        entropy: -meanOf(texts.flatMap(({ logProbs }) => logProbs)),
        textLength: meanOf(texts.map(({ tokens }) => tokens.length)),
        cutOff: meanOf(texts.map(({ finishReason }) => Number(finishReason === 'length'))),
        samplerKl: meanOf(drift),
        samplingSeconds,
      },
    }
  }

  measure({ signal, onProgress }: MeasureOptions): Promise<Evaluation> {
    const { tokenizer, seed } = this.#options
    const options = { tokenizer, seed, signal, onProgress }
    return measureRewards(this.#needSampler(), this.#data, this.#validation, options)
  }

  #logProbs(placed: PlacedTexts): Promise<Float32Array[]> {
    return placed.logProbs(this.#model, this.#options.precision)
  }

  #needSampler(): TextSampler {
    const { maxTexts } = this.#data
    this.#sampler ??= this.#model.continuousBatch({ maxTexts, precision: this.#options.precision })
    return this.#sampler
  }

  #checkRoom(prompts: readonly number[][], what: string): void {
    const { sequenceLength } = this.#options
    const { maxTokens } = this.#data
    const longest = prompts.reduce((most, { length }, i) => (length > prompts[most].length ? i : most), 0)
    // The last token of a row is predicted and not read.
    const needed = (prompts[longest]?.length ?? 0) + maxTokens - 1
    const empty = prompts.findIndex(({ length }) => length === 0)
    if (needed <= sequenceLength && empty < 0) return
    throw new MoeError({
      code: 'E_DATA',
      op: 'train',
      problem:
        empty >= 0
          ? `${what} ${empty} makes no tokens`
          : `${what} ${longest} has ${prompts[longest].length} tokens, and a text of maxTokens = ${maxTokens} goes beyond a row of ${sequenceLength}`,
      fix: empty >= 0 ? 'leave it out' : `pass a sequenceLength of ${needed}, fewer maxTokens, or shorter prompts`,
    })
  }

  dispose(): void {
    this.#sampler?.dispose()
    this.#sampler = null
  }
}
