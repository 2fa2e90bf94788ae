/** @file Texts that a model makes, and what they are worth. */
import { MoeError, type Precision, Random } from '@moe/core'
import { tokenNamed } from '../data/token-dataset.ts'
import type { TextTokenizer, TrainableModel } from '../model.ts'
import { sumOf } from './policy-gradient.ts'
import type { Prompt, Rollouts, Sample } from './rollouts.ts'

/** A text on its way: its tokens as they come, and the rest once they have. */
export interface SampledText extends AsyncIterable<number> {
  /** Every token with its log-probability in nats, behind them the one that ended the text, if one did. */
  readonly logProbs: ReadonlyArray<{ readonly token: number; readonly logProb: number }>
  /** Whether it ended by itself or at `maxTokens`; null before. */
  readonly stats: { readonly finishReason: 'stop' | 'length' | null }
}

/** How a text is drawn: from what the model says, all of it. */
export interface TextRequest {
  /** As the logits are. */
  readonly temperature: 1
  /** Log-probabilities of the tokens that were made, and of no others. */
  readonly logProbs: 0
  /** Most tokens, the one that ends the text included. */
  readonly maxTokens: number
  /** Of what is drawn: the same draws the same. */
  readonly seed: number
  /** Ends the text: who reads it gets an error. */
  readonly signal: AbortSignal
}

/** Makes many texts at the same time, with the weights that the model has then. */
export interface TextSampler {
  /** Goes on behind a prompt. Of texts that are asked for together, the same ones are the same. */
  generate(prompt: ArrayLike<number>, request: TextRequest): SampledText
  /** Frees what it holds. */
  dispose(): void
}

/** How many texts a sampler makes at once, and how it computes. */
export interface TextSamplerOptions {
  /** Most texts at the same time; further ones wait. */
  readonly maxTexts: number
  /** Arithmetic of matrix products. */
  readonly precision: Precision
}

/** A model that learns from rewards: its `loss` heeds `TokenBatch.weights` and tells `nlls`. A DeepSeek is one. */
export interface SamplingModel extends TrainableModel {
  /** A sampler of this model. */
  continuousBatch(options: TextSamplerOptions): TextSampler
}

/** A text with its reward. */
export interface Rewarded extends Sample {
  /** Ids of the prompt. */
  readonly ids: readonly number[]
  /** What the sampler said of each of `tokens`. */
  readonly logProbs: readonly number[]
  readonly reward: number
}

/** What all ranks know of a text. */
export interface TextReport {
  readonly reward: number
  /** How many it has. */
  readonly tokens: number
  /** What the sampler said of them, together. */
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
    problem: 'the data is rollouts, and the model makes no texts: it has no method continuousBatch',
    fix: 'pass a DeepSeek, or give the model what SamplingModel asks for',
  })
}

export interface EncodeOptions {
  readonly tokenizer: TextTokenizer | undefined
  readonly bos: number | null | undefined
}

/** Ids of texts. @throws MoeError E_CONFIG where there is no tokenizer, once it is asked */
export function encoder(tokenizer: TextTokenizer | undefined) {
  return (text: string, parseSpecialTokens: boolean): number[] => {
    if (tokenizer !== undefined)
      return Array.from(tokenizer.encode(text, { addSpecialTokens: false, parseSpecialTokens }))
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: 'prompts are texts and there is no tokenizer',
      fix: 'pass { tokenizer }, or prompts that are { tokens }',
    })
  }
}

/** Ids of prompts: what a template writes, or the token that begins a document and the text. */
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
  /** Is told of every text that has its reward. */
  readonly onReward?: () => void
}

/**
 * A text for each task, all at once, with its reward, which is asked for as soon as the text is there. Whatever fails, or is aborted, ends all of them.
 * @throws MoeError E_DATA for a reward that fails, or is no finite number
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
    if (tokens.length === 0 || tokens.length < count) throw untold(count, tokens.length)
    const { tokenizer } = options
    const said = tokenizer?.decode?.(tokens, { skipSpecialTokens: true }) ?? ''
    const sample: Sample = { prompt, text: said, tokens, finishReason: finishReason ?? 'length' }
    const reward = await rewardOf(sample, options.reward, signal)
    options.onReward?.()
    return { ...sample, ids, logProbs: text.logProbs.map(({ logProb }) => logProb), reward }
  }
  // All are asked for before the first is made, so that who shares a pass with whom is always the same.
  const texts = tasks.map(({ ids, seed }) =>
    sampler.generate(ids, { temperature: 1, logProbs: 0, maxTokens, seed, signal }),
  )
  const all = texts.map((text, i) =>
    one(tasks[i], text).catch(error => {
      // The first to fail is the one to tell; the others fail by it.
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
      fix: 'catch what may fail and say what such a text is worth; what was learned before is saved, go on with resume: true',
      cause,
    })
  }
  if (Number.isFinite(value)) return value
  throw new MoeError({
    code: 'E_DATA',
    op: 'reward',
    problem: `the reward of ${of} is ${typeof value === 'number' ? value : `${typeof value}, no number`}`,
    fix: 'return a finite number; what was learned before is saved, go on with resume: true',
  })
}

/** What `fn` resolves to, or the reason of the signal, also where `fn` does not heed that. */
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

const untold = (made: number, told: number) =>
  new MoeError({
    code: 'E_ATTR',
    op: 'continuousBatch',
    problem: `a text has ${made} tokens, and log-probabilities of ${told}`,
    fix: 'tell the log-probability of every token that was made, and of the one that ended the text',
  })

/** Seeds of texts: one for each of a step or a measurement, whatever was drawn before. */
export const seedOf = (seed: number, ...names: readonly (string | number)[]): number =>
  new Random(seed).fork(names.join('/')).integer(2 ** 32)
