/** @file What making a text takes and gives; session.ts makes it. */
import type { CacheDType } from '@moe/attention-mla'
import { MoeError, type OptionNames, type Precision, shown } from '@moe/core'
import { checkTop, type TokenLogProb } from './log-probs.ts'
import type { DeepSeek } from './model.ts'
import { atLeast0, checkSampling, type SamplingOptions } from './sampling.ts'

/** How one text is made. */
export interface TurnOptions extends SamplingOptions {
  /** Most tokens to make. Default 128. A text ends earlier, of `length` as well, where with its prompt it is as long as the model's context (`max_position_embeddings`). */
  readonly maxTokens?: number
  /** Of what is drawn; the same seed draws the same. Default 0. */
  readonly seed?: number
  /**
   * What ends the text besides the configuration's eos: token ids, and with a tokenizer also strings, wherever their tokens break. It is not yielded.
   */
  readonly stop?: ReadonlyArray<number | string>
  /** Fill `logProbs` of the generation, with so many of the likeliest tokens beside each that was made. */
  readonly logProbs?: number
  /** The same for the tokens of the prompt, in `promptLogProbs`. All of it is read then, whatever was read before. */
  readonly promptLogProbs?: number
  /** Ends the text between two tokens: the loop then throws E_ABORTED, with the signal's reason as its cause. */
  readonly signal?: AbortSignal
  /** Is given every id when it is made, also where texts are yielded. */
  readonly onToken?: (id: number) => void
}

/** How all texts of a session are made. */
export interface SessionOptions {
  /**
   * Let the MTP modules draft; the text is the same (greedy) or equally distributed (sampling). It pays where drafts are often accepted and a pass over some tokens
   * costs little more than over one: where reading weights takes the time, which on a CPU it does not. Default false.
   */
  readonly speculative?: boolean
  /** What the cache holds. Default f32; bf16 takes half the memory, at bf16's precision. */
  readonly cacheDtype?: CacheDType
  /** Of matrix products. Default: bf16 where weights are stored in bf16 or fewer bits, else f32. */
  readonly precision?: Precision
}

/** How a single text is made. */
export interface GenerateOptions extends TurnOptions, SessionOptions {}

/** What `generate` needs of a tokenizer to yield text: a decoder that never emits half a character. */
export interface TextTokenizer {
  /** Takes ids one at a time and gives text that is whole; `end` gives what is left. It is asked for with `skipSpecialTokens`. */
  createDecodeStream(options?: { skipSpecialTokens?: boolean }): { push(id: number): string; end(): string }
  /** Ids from here on have no text, and are not made: models have more where their vocabulary is filled up. Default: all have one. */
  readonly vocabSize?: number
}

/** How a turn of a session is made that yields text. */
export interface TextTurnOptions extends TurnOptions {
  /** Makes text of the ids. */
  readonly tokenizer: TextTokenizer
}

/** How a single text is made that is yielded as text. */
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
  constraint: true,
  seed: true,
  stop: true,
  logProbs: true,
  promptLogProbs: true,
  signal: true,
  onToken: true,
  tokenizer: true,
}

/** What a text took, filled in while it is made. */
export interface GenerationStats {
  /** Tokens of the prompt that the session had read before. */
  reused: number
  /** Tokens made. */
  tokens: number
  /** Passes through the main model, that over the prompt included. */
  steps: number
  /** Tokens drafted and accepted at each depth. */
  drafted: number[]
  /** Drafted tokens that the main model would have made, too, by depth. */
  accepted: number[]
  /** Why it ended: at an end token or a stop, or at `maxTokens` or the end of the context. Null before, and where it was left or failed. */
  finishReason: 'stop' | 'length' | null
  /** Tokens per pass so far: 1 without drafts, 1 + depth at most. */
  readonly tokensPerStep: number
}

/** What the model found likely, where that was asked for. */
export interface GenerationLogProbs {
  /** Of each token made, and behind them of the one that ended the text, where one did. */
  readonly logProbs: readonly TokenLogProb[]
  /** Of each token of the prompt; of the first nothing is known. */
  readonly promptLogProbs: ReadonlyArray<TokenLogProb | null>
}

/** Tokens (or texts) as they come, once, for `for await`: it is no promise. The rest fills up meanwhile. */
export interface Generation<T> extends AsyncIterable<T>, GenerationLogProbs {
  /** Of this text. */
  readonly stats: GenerationStats
}

/** What is told of a text beside its tokens. */
export interface Told {
  readonly stats: GenerationStats
  readonly logProbs: TokenLogProb[]
  readonly promptLogProbs: Array<TokenLogProb | null>
}

/** How far a text may go. */
export interface TextLimits {
  /** Ids from here on are not made. */
  readonly vocabulary: number
  readonly maxTokens: number
}

/** What `generate` of a model and of a session give: `decode` is called for the ids, once all is checked. */
export function generation(
  model: DeepSeek,
  depth: number,
  prompt: ArrayLike<number>,
  options: TurnOptions & Partial<TextTurnOptions>,
  decode: (tokens: number[], told: Told, limits: TextLimits) => AsyncGenerator<number>,
): Generation<number | string> {
  const { tokenizer, maxTokens = 128 } = options
  const stops = checkTurn(model, prompt, options)
  const stats: GenerationStats = {
    reused: 0,
    tokens: 0,
    steps: 0,
    drafted: new Array<number>(depth).fill(0),
    accepted: new Array<number>(depth).fill(0),
    finishReason: null,
    get tokensPerStep() {
      return this.steps === 0 ? 0 : this.tokens / this.steps
    },
  }
  const told: Told = { stats, logProbs: [], promptLogProbs: options.promptLogProbs === undefined ? [] : [null] }
  const { vocab_size: vocabulary, max_position_embeddings: context } = model.config
  const ids = decode(Array.from(prompt), told, {
    vocabulary: Math.min(vocabulary, tokenizer?.vocabSize ?? Infinity),
    maxTokens: Math.min(maxTokens, context - prompt.length),
  })
  const once = tokenizer ? texts(ids, tokenizer, stops, stats) : ids
  return { ...told, [Symbol.asyncIterator]: () => once }
}

/** The strings that end the text. @throws MoeError E_ATTR for a prompt or options that cannot be */
function checkTurn(
  model: DeepSeek,
  prompt: ArrayLike<number>,
  options: TurnOptions & Partial<TextTurnOptions>,
): string[] {
  const { maxTokens = 128, signal, tokenizer, stop } = options
  const refused = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op: 'generate', problem, fix })
  checkSampling(options)
  checkTop('generate', 'logProbs', options.logProbs)
  checkTop('generate', 'promptLogProbs', options.promptLogProbs)
  checkIds('generate', model, prompt)
  if (!atLeast0(maxTokens)) throw refused(`maxTokens = ${shown(maxTokens)} is no number of tokens`, 'pass 0 or more')
  const { max_position_embeddings: context } = model.config
  if (prompt.length + Math.min(maxTokens, 1) > context) {
    const room = maxTokens > 0 ? ', of which one is for the text' : ''
    const problem = `the prompt has ${prompt.length} tokens, and the context of the model ${context}${room}`
    throw refused(problem, 'shorten it; a model that was made for more has a larger max_position_embeddings')
  }
  if (signal !== undefined && typeof signal?.addEventListener !== 'function') {
    throw refused('signal is no AbortSignal', 'of an AbortController pass .signal')
  }
  if (tokenizer && typeof tokenizer.createDecodeStream !== 'function') {
    const fix = 'pass one of @moe/tokenizer-bpe: await BpeTokenizer.fromFile(path)'
    throw refused('the tokenizer has no createDecodeStream', fix)
  }
  if (stop !== undefined && !Array.isArray(stop)) {
    throw refused(`stop is ${JSON.stringify(stop)}`, 'pass a list of token ids and texts')
  }
  const stops = (stop ?? []).filter(stop => typeof stop === 'string')
  if (stops.length > 0 && !tokenizer) {
    const problem = `stop has a string, ${JSON.stringify(stops[0])}, but there is no tokenizer`
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

/** @throws MoeError E_ATTR for what is no sequence of token ids */
export function checkIds(op: 'generate' | 'score', model: DeepSeek, ids: ArrayLike<number>): void {
  const { vocab_size: vocabulary } = model.config
  const name = op === 'generate' ? 'prompt' : 'text'
  const refused = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op, problem, fix })
  const given: unknown = ids
  if (Array.isArray(ids?.[0]) || ArrayBuffer.isView(ids?.[0])) {
    throw refused(`the ${name} is a list of ${name}s`, `call ${op} for each of them`)
  }
  if (typeof given === 'string' || typeof ids?.length !== 'number') {
    const what = typeof given === 'string' ? 'a string' : 'no list of ids'
    throw refused(`the ${name} is ${what}`, 'pass its ids: tokenizer.encode(text)')
  }
  if (ids.length === 0) throw refused(`the ${name} is empty`, 'pass at least one token, such as bos')
  for (let i = 0; i < ids.length; i++) {
    if (Number.isInteger(ids[i]) && ids[i] >= 0 && ids[i] < vocabulary) continue
    throw refused(`token ${i} is ${ids[i]}, outside the vocabulary of ${vocabulary}`)
  }
}
