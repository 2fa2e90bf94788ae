/** @file Options and results of text generation, and their checks. Sessions and continuous batches generate the tokens. */
import type { CacheDType } from '@moe/attention-mla'
import { MoeError, type OptionNames, type Precision, shown } from '@moe/core'
import { checkIds } from './check-ids.ts'
import type { DeepSeekConfig } from './config.ts'
import { decodedText, type TextTokenizer } from './decoded-text.ts'
import { checkTop, type TokenLogProb } from './log-probs.ts'
import { atLeast0, checkSampling, type SamplingOptions } from './sampling.ts'

/** Options of one generated text. */
export interface TurnOptions extends SamplingOptions {
  /** Maximum number of generated tokens. Default 128. The text also ends, with the reason `length`, when prompt and text fill the model's context (`max_position_embeddings`). */
  readonly maxTokens?: number | undefined
  /** Seed of the sampling. Default 0. */
  readonly seed?: number | undefined
  /**
   * What ends the text besides the configuration's eos: token ids and, with a tokenizer, strings, regardless of token boundaries. Stops are not yielded.
   */
  readonly stop?: ReadonlyArray<number | string> | undefined
  /** Fills `logProbs` of the generation. The number says how many of the most likely tokens to include beside each generated token. */
  readonly logProbs?: number | undefined
  /** The same for the tokens of the prompt, in `promptLogProbs`. The whole prompt is then computed, even if it is cached. */
  readonly promptLogProbs?: number | undefined
  /** Aborts generation between two tokens: the loop throws E_ABORTED, with the signal's reason as its cause. */
  readonly signal?: AbortSignal | undefined
  /** Called with every generated id, even if text is yielded. */
  readonly onToken?: ((id: number) => void) | undefined
}

/** Options of all texts of a session. */
export interface SessionOptions {
  /**
   * Whether the MTP modules draft tokens (speculative decoding). Greedy text stays the same, sampled text has the same distribution. It is faster if drafts are often accepted and a pass over
   * several tokens takes little longer than over one, that is, if reading weights is the bottleneck; on a CPU it usually is not. A model without MTP modules cannot draft: this is an error. Default false.
   */
  readonly speculative?: boolean | undefined
  /** Format of the cache. bf16 takes half the memory. Default f32. */
  readonly cacheDtype?: CacheDType | undefined
  /** Precision of matrix products. Default: bf16 for quantized weights (bf16 included), else f32. */
  readonly precision?: Precision | undefined
}

/** Options of `DeepSeek.generate`. */
export interface GenerateOptions extends TurnOptions, SessionOptions {}

/** Options of a turn of a session that yields text. */
export interface TextTurnOptions extends TurnOptions {
  /** Makes text of the ids. */
  readonly tokenizer: TextTokenizer
}

/** Options of `DeepSeek.generate` that yields text. */
export interface TextOptions extends GenerateOptions {
  /** Makes text of the ids. */
  readonly tokenizer: TextTokenizer
}

export const sessionNames: OptionNames<SessionOptions> = { speculative: true, cacheDtype: true, precision: true }

export const turnNames: OptionNames<TextTurnOptions> = {
  maxTokens: true,
  temperature: true,
  topK: true,
  topP: true,
  minP: true,
  repetitionPenalty: true,
  frequencyPenalty: true,
  presencePenalty: true,
  logitBias: true,
  constraint: true,
  seed: true,
  stop: true,
  logProbs: true,
  promptLogProbs: true,
  signal: true,
  onToken: true,
  tokenizer: true,
}

/** Statistics of a generated text, updated while it is generated. */
export interface GenerationStats {
  /** Tokens of the prompt that were cached. */
  cachedTokens: number
  /** Generated tokens. */
  tokens: number
  /** Passes through the main model, including the one over the prompt. */
  steps: number
  /** Drafted tokens, by depth. */
  drafted: number[]
  /** Accepted drafted tokens, by depth. */
  accepted: number[]
  /** Why the text ended: at an end token or stop (`stop`), or at `maxTokens` or the end of the context (`length`). Null until then, and if generation was abandoned or failed. */
  finishReason: 'stop' | 'length' | null
  /** Tokens per pass so far: 1 without drafts, at most 1 + depth. */
  readonly tokensPerStep: number
}

/** Log-probabilities, if requested. */
export interface GenerationLogProbs {
  /** Of each generated token and, last, of the token that ended the text, if one did. */
  readonly logProbs: readonly TokenLogProb[]
  /** Of each token of the prompt; null for the first. */
  readonly promptLogProbs: ReadonlyArray<TokenLogProb | null>
}

/** Ids or text as they are generated. Read it once with `for await`; it is not a promise. The other fields are filled meanwhile. */
export interface Generation<T> extends AsyncIterable<T>, GenerationLogProbs {
  /** Statistics of this text. */
  readonly stats: GenerationStats
}

/** What is reported about a text besides its tokens. */
export interface TextReport {
  readonly stats: GenerationStats
  readonly logProbs: TokenLogProb[]
  readonly promptLogProbs: Array<TokenLogProb | null>
}

/** Limits of a text. */
export interface TextLimits {
  /** Ids from here on are never generated. */
  readonly vocabulary: number
  readonly maxTokens: number
}

/** Implements `generate` of models and sessions: checks everything, then calls `decode` for the ids. */
export function generation(
  config: DeepSeekConfig,
  depth: number,
  prompt: ArrayLike<number>,
  options: TurnOptions & Partial<TextTurnOptions>,
  decode: (tokens: number[], report: TextReport, limits: TextLimits) => AsyncGenerator<number>,
): Generation<number | string> {
  const { tokenizer, maxTokens = 128 } = options
  const stops = checkTurn(config, prompt, options)
  const stats: GenerationStats = {
    cachedTokens: 0,
    tokens: 0,
    steps: 0,
    drafted: new Array<number>(depth).fill(0),
    accepted: new Array<number>(depth).fill(0),
    finishReason: null,
    get tokensPerStep() {
      return this.steps === 0 ? 0 : this.tokens / this.steps
    },
  }
  const report: TextReport = { stats, logProbs: [], promptLogProbs: options.promptLogProbs === undefined ? [] : [null] }
  const { vocab_size: vocabulary, max_position_embeddings: context } = config
  const ids = decode(Array.from(prompt), report, {
    vocabulary: Math.min(vocabulary, tokenizer?.vocabSize ?? Infinity),
    maxTokens: Math.min(maxTokens, context - prompt.length),
  })
  const onStop = () => {
    stats.finishReason = 'stop'
  }
  const once = tokenizer ? decodedText(ids, tokenizer, stops, onStop) : ids
  return { ...report, [Symbol.asyncIterator]: () => once }
}

/** @returns the strings that end the text. @throws MoeError E_ATTR for an invalid prompt or options */
function checkTurn(
  config: DeepSeekConfig,
  prompt: ArrayLike<number>,
  options: TurnOptions & Partial<TextTurnOptions>,
): string[] {
  const { maxTokens = 128, signal, tokenizer, stop } = options
  const refused = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op: 'generate', problem, fix })
  checkSampling(options)
  checkTop('generate', 'logProbs', options.logProbs)
  checkTop('generate', 'promptLogProbs', options.promptLogProbs)
  checkIds('generate', config, prompt)
  const { vocab_size: vocabulary } = config
  const unknown = Object.keys(options.logitBias ?? {}).find(id => Number(id) >= vocabulary)
  if (unknown !== undefined) {
    throw refused(`logitBias contains token ${unknown}, outside the vocabulary of ${vocabulary}`)
  }
  if (!atLeast0(maxTokens) || maxTokens % 1 > 0)
    throw refused(`expected a whole number for maxTokens, got ${shown(maxTokens)}`, 'pass 0 or more')
  const { max_position_embeddings: context } = config
  if (prompt.length + Math.min(maxTokens, 1) > context) {
    const room = maxTokens > 0 ? ', of which generation needs one' : ''
    const problem = `the prompt has ${prompt.length} tokens, but the model's context is ${context}${room}`
    throw refused(problem, 'shorten the prompt, or open the model with a larger max_position_embeddings')
  }
  if (signal !== undefined && typeof signal?.addEventListener !== 'function') {
    throw refused('signal is not an AbortSignal', 'pass the .signal of an AbortController')
  }
  if (tokenizer && typeof tokenizer.createDecodeStream !== 'function') {
    const fix = 'pass a tokenizer of @moe/tokenizer-bpe: await BpeTokenizer.fromFile(path)'
    throw refused('the tokenizer has no createDecodeStream', fix)
  }
  if (stop !== undefined && !Array.isArray(stop)) {
    throw refused(`stop is ${JSON.stringify(stop)}`, 'pass an array of token ids and strings')
  }
  const stops = (stop ?? []).filter(stop => typeof stop === 'string')
  if (stops.length > 0 && !tokenizer) {
    const problem = `stop contains the string ${JSON.stringify(stops[0])}, but there is no tokenizer`
    throw refused(problem, 'pass { tokenizer }, or token ids')
  }
  if (stops.includes('')) throw refused('a stop string is empty')
  return stops
}
