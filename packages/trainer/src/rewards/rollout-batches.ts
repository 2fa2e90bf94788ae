/**
 * @file Batches for learning from rewards: texts are sampled, rewarded, compared within their groups, and learned from
 *   in one or several steps.
 */
import { MoeError, type Precision, Random } from '@moe/core'
import type { BatchSource, SourceEvaluationOptions } from '../batch-source.ts'
import { EpochOrder } from '../data/epoch-order.ts'
import type { Evaluation } from '../evaluate.ts'
import type { TextTokenizer, TokenBatch } from '../model.ts'
import type { RankGroup } from '../rank-group.ts'
import { measureRewards } from './evaluate-rewards.ts'
import {
  checkReference,
  countOf,
  digestOf,
  lookaheadOf,
  PackedTexts,
  type ScoringModelOnRanks,
} from './packed-texts.ts'
import {
  advantagesOf,
  deviationOf,
  divergence,
  meanOf,
  meanTerms,
  sumOf,
  type TextCounts,
  tokenWeights,
} from './policy-gradient.ts'
import type { Rollouts } from './rollouts.ts'
import {
  encodePrompts,
  type Rewarded,
  reportOf,
  type SamplingModel,
  sampleRewarded,
  seedOf,
  type TextReport,
} from './sampler.ts'
import { Sampling } from './sampling.ts'

export interface RolloutBatchesOptions {
  readonly tokenizer: TextTokenizer | undefined
  readonly bos: number | null | undefined
  readonly sequenceLength: number
  readonly batchSize: number
  readonly isolate: boolean
  readonly seed: number
  readonly precision: Precision
  readonly signal: AbortSignal
  /** Each rank samples `groups` groups per step. */
  readonly ranks: RankGroup
  /** The model on ranks, if each has a part of it. */
  readonly onRanks?: ScoringModelOnRanks | undefined
}

/** A sampled text after its prompt, with the log-probabilities of its tokens from the sampler. */
type SampledCompletion = Pick<Rewarded, 'ids' | 'tokens' | 'logProbs'>

/** The texts of a sampling round, and what this rank learns from them. */
interface Round {
  readonly number: number
  /** Counts over all ranks, including groups that are not learned from. */
  readonly all: TextCounts
  /** Micro-batches per step, on each rank. */
  readonly batches: number
  readonly packed: PackedTexts
  readonly advantages: readonly number[]
  /** Log-probability of every token under the weights that sampled it, from the training pass. */
  readonly old: readonly Float32Array[]
  readonly reference: readonly Float32Array[] | undefined
  readonly metrics: Readonly<Record<string, number>>
}

export class RolloutBatches implements BatchSource {
  readonly #model: SamplingModel
  readonly #data: Rollouts
  readonly #options: RolloutBatchesOptions
  readonly #training: readonly number[][]
  readonly #validation: readonly number[][]
  readonly #sampling: Sampling
  /** The step from which this run continues another one, and the prompts before it. */
  #from = { step: 0, rows: 0 }
  #round: Round | null = null
  readonly #order: EpochOrder
  metrics: Readonly<Record<string, number>> = {}
  readonly notices = []

  /** @throws MoeError E_DATA for a prompt that leaves no room for a text in a row */
  constructor(model: SamplingModel, data: Rollouts, options: RolloutBatchesOptions) {
    this.#model = model
    this.#data = data
    this.#options = options
    this.#training = encodePrompts(data.training, data.template, options)
    this.#validation = encodePrompts(data.validation, data.template, options)
    this.#order = new EpochOrder(this.#training.length, new Random(options.seed))
    const { ranks, onRanks, precision } = options
    this.#sampling = new Sampling(ranks, onRanks, () => model.continuousBatch({ maxTexts: data.maxTexts, precision }))
    checkReference(model, data.kl?.reference, options.onRanks)
    this.#checkRoom(this.#training, 'prompt')
    this.#checkRoom(this.#validation, 'held-out prompt')
  }

  get identity(): string {
    const { groups, groupSize, maxTokens, updates, clip, kl, average, maxTexts } = this.#data
    const how = {
      groups: groups * this.#options.ranks.size,
      groupSize,
      maxTokens,
      updates,
      clip,
      kl: kl?.weight,
      average,
      maxTexts,
    }
    return `${this.items} ${JSON.stringify(how)}`
  }

  get items(): string {
    return `${this.#training.length} prompts (${digestOf(this.#training)})`
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
    return this.#groupsPerRound * this.#data.groupSize
  }

  tokensInSteps(): number {
    return 0
  }

  tokensInStep(): number {
    const { batchSize, sequenceLength } = this.#options
    return (this.#round?.batches ?? 0) * batchSize * sequenceLength
  }

  get stride(): number {
    return this.#data.updates
  }

  epochs(steps: number): number {
    return this.rowsIn(steps) / this.#training.length
  }

  rowsIn(steps: number): number {
    return this.#promptsBefore(this.#roundOf(steps))
  }

  continueFrom(step: number, rows: number): void {
    this.#from = { step, rows }
  }

  #roundOf(step: number): number {
    return Math.floor(step / this.#data.updates)
  }

  /** Prompts that the rounds before `round` take, over all ranks. */
  #promptsBefore(round: number): number {
    const { step, rows } = this.#from
    return rows + (round - this.#roundOf(step)) * this.#groupsPerRound
  }

  prefetch(): null {
    return null
  }

  /** Groups per round, over all ranks. */
  get #groupsPerRound(): number {
    return this.#data.groups * this.#options.ranks.size
  }

  async batches(step: number): Promise<TokenBatch[] | null> {
    const { updates, clip, kl, average } = this.#data
    const number = this.#roundOf(step)
    const round = this.#round?.number === number ? this.#round : await this.#sample(number)
    if (round === null) return null
    this.#round = round
    const { all, batches, packed, advantages, old, reference } = round
    const now = step % updates === 0 ? old : await this.#logProbs(packed)
    const odds = advantages.map((advantage, i) => ({
      advantage,
      now: now[i],
      old: old[i],
      reference: reference?.[i],
    }))
    const how = { clip, klWeight: kl?.weight ?? 0, average }
    const { weights, terms } = tokenWeights(odds, how, all)
    const ofAll = (await this.#options.ranks.gather(terms)).flat()
    const { objective, clipped, kl: divergence } = meanTerms(ofAll, all.learned)
    this.metrics = { ...round.metrics, objective, clipped, ...(kl && { kl: divergence }) }
    return packed.weighted(weights, batches)
  }

  /** Samples the texts of a round. @returns null if it was interrupted on any rank */
  async #sample(number: number): Promise<Round | null> {
    const { groupSize, kl } = this.#data
    const { ranks, sequenceLength, batchSize, isolate } = this.#options
    const started = performance.now()
    const sampled = await this.#texts(number)
    if (sampled === null) return null
    const { own, texts } = sampled
    const seconds = (performance.now() - started) / 1000
    const byGroup = Array.from({ length: this.#groupsPerRound }, (_, g) =>
      texts.slice(g * groupSize, (g + 1) * groupSize).map(({ reward }) => reward),
    )
    const advantages = byGroup.map(advantagesOf)
    const isFlat = (group: readonly number[]) => group.every(advantage => advantage === 0)
    const flat = advantages.filter(isFlat).length
    // Groups with equal rewards are skipped, unless a KL term keeps them near the reference.
    const all = kl !== undefined || flat === advantages.length
    const isLearned = (_: unknown, i: number) => all || !isFlat(advantages[Math.floor(i / groupSize)])
    const first = ranks.rank * own.length
    const isLearnedHere = (_: unknown, i: number) => isLearned(_, first + i)
    const learned = own.filter(isLearnedHere)
    const lookahead = lookaheadOf(this.#model, kl?.reference)
    const packed = new PackedTexts(learned, { sequenceLength, lookahead, batchSize, isolate })
    const old = await this.#logProbs(packed)
    const drift = learned.map(({ logProbs }, i) => sumOf(logProbs.map((logProb, t) => divergence(logProb - old[i][t]))))
    const gathered = await ranks.gather({ batches: packed.batches.length, drift, seconds })
    const lengths = (of: typeof texts) => sumOf(of.map(({ tokens }) => tokens))
    const counts = { texts: texts.length, tokens: lengths(texts), learned: lengths(texts.filter(isLearned)) }
    return {
      number,
      all: counts,
      batches: Math.max(...gathered.map(({ batches }) => batches)),
      packed,
      advantages: advantages
        .flat()
        .slice(first, first + own.length)
        .filter(isLearnedHere),
      old,
      reference: kl && (await packed.logProbs(kl.reference, this.#options.precision, ranks)),
      metrics: {
        reward: meanOf(texts.map(({ reward }) => reward)),
        rewardStd: meanOf(byGroup.map(deviationOf)),
        flatGroups: flat / advantages.length,
        entropy: -sumOf(texts.map(({ logProb }) => logProb)) / counts.tokens,
        textLength: counts.tokens / counts.texts,
        cutOff: meanOf(texts.map(({ cutOff }) => Number(cutOff))),
        samplerKl: sumOf(gathered.flatMap(({ drift }) => drift)) / counts.learned,
        samplingSeconds: Math.max(...gathered.map(({ seconds }) => seconds)),
      },
    }
  }

  /** Samples the texts of a round: those that this rank learns from, and the numbers of all. */
  async #texts(number: number): Promise<{ own: readonly SampledCompletion[]; texts: readonly TextReport[] } | null> {
    const { groups, groupSize, reward, maxTokens } = this.#data
    const { seed, tokenizer, signal, ranks, onRanks } = this.#options
    const count = groups * groupSize
    const share = await this.#sampling.share(ranks.size * count)
    const prompts = this.#promptsBefore(number)
    const taskOf = (i: number) => {
      const prompt = this.#order.at(prompts + Math.floor(i / groupSize))
      return {
        prompt: this.#data.training[prompt],
        ids: this.#training[prompt],
        seed: seedOf(seed, 'rollouts', number, i),
      }
    }
    const tasks = Array.from({ length: share.to - share.from }, (_, i) => taskOf(share.from + i))
    const options = { reward, maxTokens, tokenizer, signal }
    let sampled: readonly Rewarded[] = []
    const sent = await this.#sampling.run(signal, async sampler => {
      sampled = await sampleRewarded(sampler, tasks, options)
      // The texts themselves only for ranks that do not sample their own.
      return sampled.map(text => {
        const { tokens, logProbs } = text
        return { report: reportOf(text), ...(onRanks && { completion: { tokens, logProbs } }) }
      })
    })
    if (sent === null) return null
    const texts = sent.map(({ report }) => report)
    const first = ranks.rank * count
    const own = sent
      .slice(first, first + count)
      .flatMap(({ completion }, i) => (completion ? [{ ids: taskOf(first + i).ids, ...completion }] : []))
    return { own: onRanks ? own : sampled, texts }
  }

  evaluate({ signal, onProgress }: SourceEvaluationOptions): Promise<Evaluation | null> {
    const { tokenizer, seed } = this.#options
    return measureRewards(this.#sampling, this.#data, this.#validation, { tokenizer, seed, signal, onProgress })
  }

  #logProbs(packed: PackedTexts): Promise<Float32Array[]> {
    const { precision, ranks, onRanks } = this.#options
    return packed.logProbs(onRanks ?? this.#model, precision, ranks)
  }

  #checkRoom(prompts: readonly number[][], what: string): void {
    const { sequenceLength } = this.#options
    const { maxTokens } = this.#data
    const longest = prompts.reduce((most, { length }, i) => (length > prompts[most].length ? i : most), 0)
    // The last token of a row is only predicted, and needs no position.
    const needed = (prompts[longest]?.length ?? 0) + maxTokens - 1
    const empty = prompts.findIndex(({ length }) => length === 0)
    if (needed <= sequenceLength && empty < 0) return
    throw new MoeError({
      code: 'E_DATA',
      op: 'train',
      problem:
        empty >= 0
          ? `${what} ${empty} has no tokens`
          : `${what} ${longest} has ${prompts[longest].length} tokens and does not fit into a row of ${sequenceLength} with a text of maxTokens = ${maxTokens}`,
      fix: empty >= 0 ? 'leave it out' : `pass a sequenceLength of ${needed}, fewer maxTokens, or shorter prompts`,
    })
  }

  dispose(): void {
    this.#sampling.dispose()
  }
}
