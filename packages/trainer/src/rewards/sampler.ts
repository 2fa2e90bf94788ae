/** @file Samples texts from a model and computes their rewards. */
import { MoeError, type Precision, Random } from '@moe/core'
import { tokenNamed } from '../data/token-dataset.ts'
import type { TextTokenizer, TrainableModel } from '../model.ts'
import { sumOf } from './policy-gradient.ts'
import type { Prompt, Rollouts, Sample } from './rollouts.ts'

/**
 * A text that is being sampled. Iterating yields its tokens; the other members are complete when the iteration ends.
 */
export interface SampledText extends AsyncIterable<number> {
  /** Every token with its log-probability in nats, including the end token if there is one. */
  readonly logProbs: ReadonlyArray<{ readonly token: number; readonly logProb: number }>
  /** Whether the text ended by itself or at `maxTokens`; null while it is being sampled. */
  readonly stats: { readonly finishReason: 'stop' | 'length' | null }
}

/** How to sample a text: from the model's full distribution. */
export interface TextRequest {
  /** Temperature 1: the logits are not scaled. */
  readonly temperature: 1
  /** 0: log-probabilities of the sampled tokens, without alternatives. */
  readonly logProbs: 0
  /** Maximum number of tokens, including the end token. */
  readonly maxTokens: number
  /** Seed of sampling. Equal seeds give equal texts. */
  readonly seed: number
  /** Stops sampling; reading the text then throws. */
  readonly signal: AbortSignal
}

/** Samples many texts at the same time, with the model's current weights. */
export interface TextSampler {
  /** Samples a completion of a prompt. Requesting the same texts together gives the same results. */
  generate(prompt: ArrayLike<number>, request: TextRequest): SampledText
  /** Frees caches and other memory. */
  dispose(): void
}

/** Options of `continuousBatch`. */
export interface TextSamplerOptions {
  /** Maximum number of texts at the same time; further ones wait. */
  readonly maxTexts: number
  /** Precision of matrix products. */
  readonly precision: Precision
}

/**
 * A model that can learn from rewards: its `loss` applies `TokenBatch.weights` and returns `nlls`. DeepSeek models are
 * such models.
 */
export interface SamplingModel extends TrainableModel {
  /** Returns a sampler for this model. */
  continuousBatch(options: TextSamplerOptions): TextSampler
}

/** A text with its reward. */
export interface Rewarded extends Sample {
  /** Ids of the prompt. */
  readonly ids: readonly number[]
  /** Log-probability of each of `tokens`, from the sampler. */
  readonly logProbs: readonly number[]
  readonly reward: number
}

/** The numbers of a text that are gathered on all ranks. */
export interface TextReport {
  readonly reward: number
  /** Number of tokens. */
  readonly tokens: number
  /** Their total log-probability, from the sampler. */
  readonly logProb: number
  readonly cutOff: boolean
}

export const reportOf = ({ reward, tokens, logProbs, finishReason }: Rewarded): TextReport => ({
  reward,
  tokens: tokens.length,
  logProb: sumOf(logProbs),
  cutOff: finishReason === 'length',
})

/** @throws MoeError E_ATTR */
export function checkSampling(model: TrainableModel): SamplingModel {
  if (typeof (model as Partial<SamplingModel>).continuousBatch === 'function') return model as SamplingModel
  throw new MoeError({
    code: 'E_ATTR',
    op: 'train',
    problem: 'the data is rollouts, but the model has no method continuousBatch to sample texts',
    fix: 'pass a DeepSeek, or implement SamplingModel',
  })
}

export interface EncodeOptions {
  readonly tokenizer: TextTokenizer | undefined
  readonly bos: number | null | undefined
}

/** Returns an encoder for texts. It throws MoeError E_CONFIG when it is called without a tokenizer. */
export function encoder(tokenizer: TextTokenizer | undefined) {
  return (text: string, parseSpecialTokens: boolean): number[] => {
    if (tokenizer !== undefined)
      return Array.from(tokenizer.encode(text, { addSpecialTokens: false, parseSpecialTokens }))
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: 'prompts are texts, but no tokenizer is given',
      fix: 'pass { tokenizer }, or prompts of the form { tokens }',
    })
  }
}

/** Returns the ids of prompts: messages are rendered by the template, and texts get a begin token. */
export function encodePrompts(
  prompts: readonly Prompt[],
  template: Rollouts['template'],
  { tokenizer, bos }: EncodeOptions,
): number[][] {
  const encode = encoder(tokenizer)
  const begin =
    bos === undefined && tokenizer ? (tokenNamed(tokenizer, 'begin') ?? tokenNamed(tokenizer, 'end')) : (bos ?? null)
  return prompts.map(prompt => {
    if ('tokens' in prompt) return Array.from(prompt.tokens)
    if ('text' in prompt) return [...(begin === null ? [] : [begin]), ...encode(prompt.text, false)]
    return encode(template?.render(prompt.messages, { addGenerationPrompt: true }) ?? '', true)
  })
}

export interface SampleTask {
  readonly prompt: Prompt
  readonly ids: readonly number[]
  readonly seed: number
}

export interface SampleOptions {
  readonly reward: Rollouts['reward']
  readonly maxTokens: number
  readonly tokenizer: TextTokenizer | undefined
  readonly signal: AbortSignal
  /** Called for every text that has its reward. */
  readonly onReward?: (() => void) | undefined
}

/**
 * Samples a text for each task, all at once, and computes its reward as soon as the text is complete. If one fails or
 * is aborted, all are.
 *
 * @throws MoeError E_DATA for a reward function that fails or does not return a finite number
 */
export async function sampleRewarded(
  sampler: TextSampler,
  tasks: readonly SampleTask[],
  options: SampleOptions,
): Promise<Rewarded[]> {
  const { maxTokens } = options
  const own = new AbortController()
  const signal = AbortSignal.any([options.signal, own.signal])
  const one = async ({ prompt, ids }: SampleTask, text: SampledText): Promise<Rewarded> => {
    let count = 0
    for await (const _ of text) count++
    const { finishReason } = text.stats
    const tokens = text.logProbs.map(({ token }) => token)
    if (tokens.length === 0 || tokens.length < count) throw missingLogProbs(count, tokens.length)
    const { tokenizer } = options
    const decoded = tokenizer?.decode?.(tokens, { skipSpecialTokens: true }) ?? ''
    const sample: Sample = { prompt, text: decoded, tokens, finishReason: finishReason ?? 'length' }
    const reward = await rewardOf(sample, options.reward, signal)
    options.onReward?.()
    return { ...sample, ids, logProbs: text.logProbs.map(({ logProb }) => logProb), reward }
  }
  // All are requested before the first one is sampled, so that they are always batched in the same way.
  const texts = tasks.map(({ ids, seed }) =>
    sampler.generate(ids, { temperature: 1, logProbs: 0, maxTokens, seed, signal }),
  )
  const all = texts.map((text, i) =>
    one(tasks[i], text).catch(error => {
      // The first failure is reported; the others fail because of it.
      own.abort(error)
      throw error
    }),
  )
  const done = await Promise.allSettled(all)
  if (own.signal.aborted) throw options.signal.aborted ? options.signal.reason : own.signal.reason
  return done.map(result => (result as PromiseFulfilledResult<Rewarded>).value)
}

async function rewardOf(sample: Sample, reward: Rollouts['reward'], signal: AbortSignal): Promise<number> {
  const of = `a text of ${sample.tokens.length} tokens, ${JSON.stringify(sample.text.slice(0, 80))}`
  let value: number
  try {
    value = await untilAborted(signal, async () => reward(sample, { signal }))
  } catch (cause) {
    if (signal.aborted) throw signal.reason
    throw new MoeError({
      code: 'E_DATA',
      op: 'reward',
      problem: `the reward of ${of} failed: ${cause instanceof Error ? cause.message : cause}`,
      fix: 'catch errors in the reward function and return a reward for such texts; earlier steps are saved, continue with resume: true',
      cause,
    })
  }
  if (Number.isFinite(value)) return value
  throw new MoeError({
    code: 'E_DATA',
    op: 'reward',
    problem: `the reward of ${of} is ${typeof value === 'number' ? value : `of type ${typeof value}`}`,
    fix: 'return a finite number; earlier steps are saved, continue with resume: true',
  })
}

/** Resolves to the result of `fn`, or rejects when the signal is aborted, even if `fn` ignores it. */
async function untilAborted<T>(signal: AbortSignal, fn: () => Promise<T>): Promise<T> {
  signal.throwIfAborted()
  let stop = () => {}
  const aborted = new Promise<never>((_, reject) => {
    stop = () => reject(signal.reason)
    signal.addEventListener('abort', stop, { once: true })
  })
  try {
    return await Promise.race([fn(), aborted])
  } finally {
    signal.removeEventListener('abort', stop)
  }
}

const missingLogProbs = (tokens: number, logProbs: number) =>
  new MoeError({
    code: 'E_ATTR',
    op: 'continuousBatch',
    problem: `a text has ${tokens} tokens, but ${logProbs} log-probabilities`,
    fix: 'return the log-probability of every sampled token, including the end token',
  })

/** The seed of a text, from its position in a step or an evaluation. It does not depend on earlier texts. */
export const seedOf = (seed: number, ...names: readonly (string | number)[]): number =>
  new Random(seed).fork(names.join('/')).integer(2 ** 32)
