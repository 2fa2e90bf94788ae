/** @file What the texts that a model makes for held-out prompts are worth. */
import { checkOptions, checkPrecision, MoeError, type OptionNames, type Precision } from '@moe/core'
import type { Evaluation } from '../evaluate.ts'
import type { TextTokenizer, TrainableModel } from '../model.ts'
import { meanOf, sumOf } from './policy-gradient.ts'
import type { Rollouts } from './rollouts.ts'
import { checkSampling, encodePrompts, reportOf, sampleRewarded, seedOf, type TextSampler } from './sampler.ts'
import { TextRanks } from './text-ranks.ts'

/** How texts are made and read in a measurement of rewards. */
export interface EvaluateRewardsOptions {
  /** Makes tokens of prompts and text of what was made. */
  readonly tokenizer?: TextTokenizer
  /** Id before prompts that are texts, as in `train`. */
  readonly bos?: number | null
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
  /** Names what is drawn: `train` with the same seed draws the same. Default 0. */
  readonly seed?: number
  /** Ends the measurement; the promise then rejects with the signal's reason. */
  readonly signal?: AbortSignal
  /** Is told after each text which share of the measurement is done. */
  readonly onProgress?: (done: number) => void
}

const names: OptionNames<EvaluateRewardsOptions> = {
  tokenizer: true,
  bos: true,
  precision: true,
  seed: true,
  signal: true,
  onProgress: true,
}

/**
 * Makes a text for each held-out prompt of rollouts, as `train` does when it measures: at temperature 1, so that the mean of the rewards is an estimate of what training maximizes.
 * @throws MoeError E_DATA where nothing is held out, or a reward fails
 */
export async function evaluateRewards(
  model: TrainableModel,
  data: Rollouts,
  options: EvaluateRewardsOptions = {},
): Promise<Evaluation> {
  checkOptions('evaluateRewards', options, names)
  const { tokenizer, bos, precision = 'f32', seed = 0, signal = new AbortController().signal } = options
  checkPrecision('evaluateRewards', precision)
  if (!(data?.validation?.length > 0)) {
    const fix = 'pass rollouts(prompts, { validation })'
    throw new MoeError({ code: 'E_DATA', op: 'evaluateRewards', problem: 'no prompts are held out', fix })
  }
  const prompts = encodePrompts(data.validation, data.template, { tokenizer, bos })
  const sampler = checkSampling(model).continuousBatch({ maxTexts: data.maxTexts, precision })
  try {
    const { onProgress = () => {} } = options
    const ranks = new TextRanks()
    const measured = await measureRewards(sampler, data, prompts, { tokenizer, seed, signal, onProgress, ranks })
    if (measured === null) throw signal.reason
    return measured
  } finally {
    sampler.dispose()
  }
}

interface MeasureRewardsOptions {
  readonly tokenizer: TextTokenizer | undefined
  readonly seed: number
  readonly signal: AbortSignal
  readonly onProgress: (done: number) => void
  /** Each makes its share of the texts. */
  readonly ranks: TextRanks
}

/**
 * @param ids of the held-out prompts
 * @returns null when it was interrupted on one of the ranks
 */
export async function measureRewards(
  sampler: TextSampler,
  { validation, reward, maxTokens }: Rollouts,
  ids: ReadonlyArray<readonly number[]>,
  { tokenizer, seed, signal, onProgress, ranks }: MeasureRewardsOptions,
): Promise<Evaluation | null> {
  const started = performance.now()
  const { from, to } = ranks.share(validation.length)
  const tasks = validation
    .map((prompt, i) => ({ prompt, ids: ids[i], seed: seedOf(seed, 'validation', i) }))
    .slice(from, to)
  let done = 0
  const onReward = () => onProgress(++done / tasks.length)
  const options = { reward, maxTokens, tokenizer, signal, onReward }
  const texts = await ranks.all(signal, async () => (await sampleRewarded(sampler, tasks, options)).map(reportOf))
  if (texts === null) return null
  const tokens = sumOf(texts.map(({ tokens }) => tokens))
  return {
    loss: -sumOf(texts.map(({ logProb }) => logProb)) / tokens,
    bitsPerByte: Number.NaN,
    tokens,
    seconds: (performance.now() - started) / 1000,
    reward: meanOf(texts.map(({ reward }) => reward)),
  }
}
