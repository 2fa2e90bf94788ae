/** @file Evaluates the rewards of texts for held-out prompts. */
import { checkOptions, checkPrecision, MoeError, type OptionNames, type Precision } from '@moe/core'
import type { Evaluation } from '../evaluate.ts'
import type { TextTokenizer, TrainableModel } from '../model.ts'
import { RankGroup } from '../rank-group.ts'
import { meanOf, sumOf } from './policy-gradient.ts'
import type { Rollouts } from './rollouts.ts'
import { checkSampling, encodePrompts, reportOf, sampleRewarded, seedOf } from './sampler.ts'
import { Sampling } from './sampling.ts'

/** Options of `evaluateRewards`. */
export interface EvaluateRewardsOptions {
  /** Encodes prompts and decodes the sampled texts. */
  readonly tokenizer?: TextTokenizer | undefined
  /** Id of the token before text prompts, as in `train`. */
  readonly bos?: number | null | undefined
  /** Precision of matrix products. Default f32. */
  readonly precision?: Precision | undefined
  /** Seed of sampling. `train` with the same seed samples the same texts from the same weights. Default 0. */
  readonly seed?: number | undefined
  /** Stops the evaluation. The promise then rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined
  /** Called after each text with the fraction of the evaluation that is done. */
  readonly onProgress?: ((done: number) => void) | undefined
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
 * Samples one text for each held-out prompt of `data` and evaluates its reward, as `train` does: at temperature 1, so
 * that the mean reward estimates what training maximizes.
 *
 * @throws MoeError E_DATA if no prompts are held out, or a reward function fails
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
    const sampling = new Sampling(new RankGroup(), undefined, () => sampler)
    const measured = await measureRewards(sampling, data, prompts, { tokenizer, seed, signal, onProgress })
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
}

/**
 * @param ids of the held-out prompts
 * @returns null if it was interrupted on any rank
 */
export async function measureRewards(
  sampling: Sampling,
  { validation, reward, maxTokens }: Rollouts,
  ids: ReadonlyArray<readonly number[]>,
  { tokenizer, seed, signal, onProgress }: MeasureRewardsOptions,
): Promise<Evaluation | null> {
  const started = performance.now()
  const { from, to } = await sampling.share(validation.length)
  const tasks = validation
    .map((prompt, i) => ({ prompt, ids: ids[i], seed: seedOf(seed, 'validation', i) }))
    .slice(from, to)
  let done = 0
  const onReward = () => onProgress(++done / tasks.length)
  const options = { reward, maxTokens, tokenizer, signal, onReward }
  const texts = await sampling.run(signal, async sampler =>
    (await sampleRewarded(sampler, tasks, options)).map(reportOf),
  )
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
