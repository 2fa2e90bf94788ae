/** @file Options and results of text generation. session.ts implements it. */
import type { CacheDType } from '@moe/attention-mla'
import { MoeError, type OptionNames, type Precision, shown } from '@moe/core'
import { checkTop, type TokenLogProb } from './log-probs.ts'
import type { Network } from './network.ts'
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
   * several tokens takes little longer than over one, that is, if reading weights is the bottleneck; on a CPU it usually is not. Default false.
   */
  readonly speculative?: boolean | undefined
  /** Format of the cache. bf16 takes half the memory. Default f32. */
  readonly cacheDtype?: CacheDType | undefined
  /** Precision of matrix products. Default: bf16 for quantized weights (bf16 included), else f32. */
  readonly precision?: Precision | undefined
}

/** Options of `DeepSeek.generate`. */
export interface GenerateOptions extends TurnOptions, SessionOptions {}

/** What `generate` needs from a tokenizer to yield text: a decoder that never splits a character. */
export interface TextTokenizer {
  /** Creates a decoder that takes ids one at a time and returns complete characters; `end` returns the rest. Called with `skipSpecialTokens`. */
  createDecodeStream(options?: { skipSpecialTokens?: boolean }): { push(id: number): string; end(): string }
  /** Number of ids that have text. Higher ids, which models with a padded vocabulary have, are never generated. Default: all ids. */
  readonly vocabSize?: number
}

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
  model: Network,
  depth: number,
  prompt: ArrayLike<number>,
  options: TurnOptions & Partial<TextTurnOptions>,
  decode: (tokens: number[], report: TextReport, limits: TextLimits) => AsyncGenerator<number>,
): Generation<number | string> {
  const { tokenizer, maxTokens = 128 } = options
  const stops = checkTurn(model, prompt, options)
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
  const { vocab_size: vocabulary, max_position_embeddings: context } = model.config
  const ids = decode(Array.from(prompt), report, {
    vocabulary: Math.min(vocabulary, tokenizer?.vocabSize ?? Infinity),
    maxTokens: Math.min(maxTokens, context - prompt.length),
  })
  const once = tokenizer ? texts(ids, tokenizer, stops, stats) : ids
  return { ...report, [Symbol.asyncIterator]: () => once }
}

/** @returns the strings that end the text. @throws MoeError E_ATTR for an invalid prompt or options */
function checkTurn(
  model: Network,
  prompt: ArrayLike<number>,
  options: TurnOptions & Partial<TextTurnOptions>,
): string[] {
  const { maxTokens = 128, signal, tokenizer, stop } = options
  const refused = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op: 'generate', problem, fix })
  checkSampling(options)
  checkTop('generate', 'logProbs', options.logProbs)
  checkTop('generate', 'promptLogProbs', options.promptLogProbs)
  checkIds('generate', model, prompt)
  const { vocab_size: vocabulary } = model.config
  const unknown = Object.keys(options.logitBias ?? {}).find(id => Number(id) >= vocabulary)
  if (unknown !== undefined) {
    throw refused(`logitBias contains token ${unknown}, outside the vocabulary of ${vocabulary}`)
  }
  if (!atLeast0(maxTokens))
    throw refused(`expected a whole number for maxTokens, got ${shown(maxTokens)}`, 'pass 0 or more')
  const { max_position_embeddings: context } = model.config
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

async function* texts(
  ids: AsyncIterable<number>,
  tokenizer: TextTokenizer,
  stops: readonly string[],
  stats: GenerationStats,
): AsyncGenerator<string> {
  const stream = tokenizer.createDecodeStream({ skipSpecialTokens: true })
  let held = ''
  for await (const id of ids) {
    held += stream.push(id)
    const end = firstStop(held, stops)
    if (end >= 0) {
      stats.finishReason = 'stop'
      if (end > 0) yield held.slice(0, end)
      return
    }
    const safe = held.length - unfinished(held, stops)
    if (safe > 0) yield held.slice(0, safe)
    held = held.slice(safe)
  }
  held += stream.end()
  const end = firstStop(held, stops)
  if (end >= 0) stats.finishReason = 'stop'
  const rest = end < 0 ? held : held.slice(0, end)
  if (rest !== '') yield rest
}

/** Where the earliest stop string begins, or -1. */
function firstStop(text: string, stops: readonly string[]): number {
  const found = stops.map(stop => text.indexOf(stop)).filter(at => at >= 0)
  return found.length === 0 ? -1 : Math.min(...found)
}

/** Length of the longest end of the text that may become a stop string. */
function unfinished(text: string, stops: readonly string[]): number {
  let longest = 0
  for (const stop of stops) {
    for (let n = Math.min(stop.length - 1, text.length); n > longest; n--) {
      if (text.endsWith(stop.slice(0, n))) longest = n
    }
  }
  return longest
}

/** @throws MoeError E_ATTR for an invalid sequence of token ids */
export function checkIds(op: 'generate' | 'score', model: Network, ids: ArrayLike<number>): void {
  const { vocab_size: vocabulary } = model.config
  const name = op === 'generate' ? 'prompt' : 'text'
  const refused = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op, problem, fix })
  const given: unknown = ids
  if (Array.isArray(ids?.[0]) || ArrayBuffer.isView(ids?.[0])) {
    throw refused(`expected the token ids of one ${name}, got a list of ${name}s`, `call ${op} for each of them`)
  }
  if (typeof given === 'string' || typeof ids?.length !== 'number') {
    const what = typeof given === 'string' ? 'a string' : shown(given)
    throw refused(`expected the token ids of the ${name}, got ${what}`, 'pass tokenizer.encode(text)')
  }
  if (ids.length === 0) throw refused(`the ${name} is empty`, 'pass at least one token, for example bos')
  for (let i = 0; i < ids.length; i++) {
    if (Number.isInteger(ids[i]) && ids[i] >= 0 && ids[i] < vocabulary) continue
    throw refused(`token ${i} is ${ids[i]}, outside the vocabulary of ${vocabulary}`)
  }
}
