/** @file Continuing a text token by token over a cache, optionally with MTP modules drafting ahead. */
import type { CacheDType } from '@moe/attention-mla'
import {
  checkOptions,
  MoeError,
  namedParameters,
  type OptionNames,
  type Precision,
  QuantizedParameter,
  Random,
  type Tensor,
} from '@moe/core'
import { endTokens } from './config.ts'
import { DecodeStep } from './decode-step.ts'
import { Drafter } from './drafter.ts'
import type { DeepSeek } from './model.ts'
import { checkSampling, type SamplingOptions, sample, verifyDraft } from './sampling.ts'

export interface GenerateOptions extends SamplingOptions {
  /** Most tokens to make. Default 128. */
  readonly maxTokens?: number
  /** Of what is drawn; the same seed draws the same. Default 0. */
  readonly seed?: number
  /**
   * What ends the text besides the configuration's eos: token ids, and with a tokenizer also strings, wherever their tokens break. It is not yielded.
   */
  readonly stop?: ReadonlyArray<number | string>
  readonly signal?: AbortSignal
  /** Let the MTP modules draft; the text is the same (greedy) or equally distributed (sampling). Default: when there are any. */
  readonly speculative?: boolean
  readonly onToken?: (id: number) => void
  /** What the cache holds. Default f32; bf16 takes half the memory, at bf16's precision. */
  readonly cacheDtype?: CacheDType
  /** Of matrix products. Default: bf16 where weights are stored in bf16 or fewer bits, else f32. */
  readonly precision?: Precision
}

/** What `generate` needs of a tokenizer to yield text: a decoder that never emits half a character. */
export interface TextTokenizer {
  createDecodeStream(options?: { skipSpecialTokens?: boolean }): { push(id: number): string; end(): string }
}

export interface TextOptions extends GenerateOptions {
  readonly tokenizer: TextTokenizer
}

const names: OptionNames<TextOptions> = {
  maxTokens: true,
  temperature: true,
  topP: true,
  minP: true,
  seed: true,
  stop: true,
  signal: true,
  speculative: true,
  onToken: true,
  cacheDtype: true,
  precision: true,
  tokenizer: true,
}

export interface GenerationStats {
  /** Tokens made. */
  tokens: number
  /** Passes through the main model, that over the prompt included. */
  steps: number
  /** Tokens drafted and accepted at each depth. */
  drafted: number[]
  accepted: number[]
  /** Tokens per pass so far: 1 without drafts, 1 + depth at most. */
  readonly tokensPerStep: number
}

/** Tokens (or texts) as they come, once; `stats` fills up meanwhile. */
export interface Generation<T> extends AsyncIterable<T> {
  readonly stats: GenerationStats
}

/** Internal: see `DeepSeek.generate`. */
export function generate(
  model: DeepSeek,
  prompt: ArrayLike<number>,
  options: GenerateOptions | TextOptions,
): Generation<number | string> {
  checkOptions<Partial<TextOptions>>('generate', options, names)
  checkSampling(options)
  checkPrompt(model, prompt)
  const { maxTokens = 0 } = options
  if (!(maxTokens >= 0)) {
    const problem = `maxTokens = ${maxTokens} is no number of tokens`
    throw new MoeError({ code: 'E_ATTR', op: 'generate', problem, fix: 'pass 0 or more' })
  }
  if (options.signal !== undefined && typeof options.signal?.addEventListener !== 'function') {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: 'signal is no AbortSignal',
      fix: 'of an AbortController pass .signal',
    })
  }
  const depth = options.speculative === false ? 0 : model.mtp.length
  const stats: GenerationStats = {
    tokens: 0,
    steps: 0,
    drafted: new Array<number>(depth).fill(0),
    accepted: new Array<number>(depth).fill(0),
    get tokensPerStep() {
      return this.steps === 0 ? 0 : this.tokens / this.steps
    },
  }
  const ids = decode(model, Array.from(prompt), options, depth, stats)
  const tokenizer = 'tokenizer' in options ? options.tokenizer : null
  if (tokenizer && typeof tokenizer.createDecodeStream !== 'function') {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: 'the tokenizer has no createDecodeStream',
      fix: 'pass one of @moe/tokenizer-bpe: await BpeTokenizer.fromFile(path)',
    })
  }
  if (options.stop !== undefined && !Array.isArray(options.stop)) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: `stop is ${JSON.stringify(options.stop)}`,
      fix: 'pass a list of token ids and texts',
    })
  }
  const stops = (options.stop ?? []).filter(stop => typeof stop === 'string')
  if (stops.includes('') || (stops.length > 0 && !tokenizer)) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: tokenizer
        ? 'a stop string is empty'
        : `stop has a string, ${JSON.stringify(stops[0])}, but there is no tokenizer`,
      fix: tokenizer ? undefined : 'pass { tokenizer }, or token ids',
    })
  }
  const once = tokenizer ? texts(ids, tokenizer, stops) : ids
  return { stats, [Symbol.asyncIterator]: () => once }
}

async function* texts(
  ids: AsyncIterable<number>,
  tokenizer: TextTokenizer,
  stops: readonly string[],
): AsyncGenerator<string> {
  const stream = tokenizer.createDecodeStream({ skipSpecialTokens: true })
  let held = ''
  for await (const id of ids) {
    held += stream.push(id)
    const end = firstStop(held, stops)
    if (end >= 0) {
      if (end > 0) yield held.slice(0, end)
      return
    }
    const safe = held.length - unfinished(held, stops)
    if (safe > 0) yield held.slice(0, safe)
    held = held.slice(safe)
  }
  held += stream.end()
  const end = firstStop(held, stops)
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

function checkPrompt(model: DeepSeek, prompt: ArrayLike<number>): void {
  const { vocab_size: vocabulary } = model.config
  const given: unknown = prompt
  const several = Array.isArray(prompt?.[0]) || ArrayBuffer.isView(prompt?.[0])
  if (typeof given === 'string' || several || typeof prompt?.length !== 'number') {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: `the prompt is ${typeof given === 'string' ? 'a text' : several ? 'a list of prompts' : 'no list of ids'}`,
      fix: several ? 'call generate for each of them' : 'pass its ids: tokenizer.encode(text)',
    })
  }
  if (prompt.length === 0) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: 'the prompt is empty',
      fix: 'pass at least one token, such as bos',
    })
  }
  for (let i = 0; i < prompt.length; i++) {
    if (Number.isInteger(prompt[i]) && prompt[i] >= 0 && prompt[i] < vocabulary) continue
    throw new MoeError({
      code: 'E_ATTR',
      op: 'generate',
      problem: `token ${i} is ${prompt[i]}, outside the vocabulary of ${vocabulary}`,
    })
  }
}

/** Most tokens of a prompt in one pass. Tests make it small. */
export const limits = { promptPiece: 2048 }

/** Stored weights are rounded more than bf16 rounds what they are multiplied with. */
function usualPrecision(model: DeepSeek): Precision {
  return namedParameters(model).some(({ parameter }) => parameter instanceof QuantizedParameter) ? 'bf16' : 'f32'
}

async function* decode(
  model: DeepSeek,
  tokens: number[],
  options: GenerateOptions,
  depth: number,
  stats: GenerationStats,
): AsyncGenerator<number> {
  const { maxTokens = 128, signal, onToken, cacheDtype: dtype, precision = usualPrecision(model) } = options
  const ends = new Set<number | string>([...endTokens(model.config), ...(options.stop ?? [])])
  const random = new Random(options.seed ?? 0)
  const capacity = 2 ** Math.ceil(Math.log2(Math.max(64, tokens.length + Math.min(maxTokens, 512) + depth + 1)))
  const cache = model.makeCache({ capacity, dtype })
  const step = new DecodeStep(model, cache, { precision, sampling: options })
  let drafter: Drafter | undefined
  let pending = tokens.slice()
  let drafts: number[] = []
  let hidden: Tensor | null = null
  /** A backend that computes on this thread never waits: signals, timers and whoever reads the tokens get their turn here. */
  const turn = async () => {
    await new Promise(setImmediate)
    if (!signal?.aborted) return
    throw new MoeError({ code: 'E_ABORTED', op: 'generate', problem: 'was aborted', cause: signal.reason })
  }
  try {
    drafter = new Drafter(model, depth, { capacity, dtype, precision })
    // What a pass needs grows with its tokens: a long prompt goes through in pieces.
    while (pending.length > limits.promptPiece && maxTokens > 0) {
      await turn()
      const piece = pending.splice(0, limits.promptPiece)
      hidden = (await step.run(piece, 1)).hidden
      await drafter.draft(hidden, piece.length, tokens)
      hidden.dispose()
    }
    while (stats.tokens < maxTokens) {
      await turn()
      const before = cache.lengths[0]
      const verified = await step.run([...pending, ...drafts], drafts.length + 1)
      const { rows } = verified
      hidden = verified.hidden
      stats.steps++
      const made: number[] = []
      for (let i = 0; i < rows.length; i++) {
        if (i === drafts.length) {
          made.push(sample(rows[i], options, random))
          break
        }
        stats.drafted[i]++
        const { token, accepted } = verifyDraft(rows[i], drafts[i], options, random)
        made.push(token)
        if (!accepted) break
        stats.accepted[i]++
      }
      const confirmed = pending.length + made.length - 1
      cache.truncate(before + confirmed)
      tokens.push(...made)
      for (const token of made) {
        if (ends.has(token)) return
        stats.tokens++
        onToken?.(token)
        yield token
        if (stats.tokens >= maxTokens) return
      }
      pending = [made[made.length - 1]]
      drafts = await drafter.draft(hidden, confirmed, tokens)
      hidden.dispose()
    }
  } finally {
    // Also when whoever reads the tokens stops early.
    hidden?.dispose()
    step.dispose()
    cache.dispose()
    drafter?.dispose()
  }
}
