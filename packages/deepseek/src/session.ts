/** @file Generates texts one after the other over one cache, optionally with speculative decoding. Only tokens that differ from the previous text are processed. */
import type { KvCache } from '@moe/attention-mla'
import {
  checkOptions,
  checkPrecision,
  MoeError,
  type Precision,
  Random,
  type Tensor,
  yieldToEventLoop,
} from '@moe/core'
import { endTokens } from './config.ts'
import { DecodeStep } from './decode-step.ts'
import { defaultPrecision } from './default-precision.ts'
import { Drafter, DraftMemory, draftDepth } from './drafter.ts'
import {
  type Generation,
  generation,
  type SessionOptions,
  sessionNames,
  type TextLimits,
  type TextReport,
  type TextTurnOptions,
  type TurnOptions,
  turnNames,
} from './generation.ts'
import { logProbsBehind, logProbsOf, type TokenLogProb } from './log-probs.ts'
import type { Network } from './network.ts'
import { nextTokens } from './next-tokens.ts'
import { Occurrences } from './process-logits.ts'
import { WeightWatch } from './weight-watch.ts'

/** Maximum number of prompt tokens per pass. Tests reduce it. */
export const limits = { prefillChunkSize: 2048 }

type LimitedTurn = TurnOptions & TextLimits

/** The parts of a session that use device memory. */
interface Parts {
  readonly cache: KvCache
  readonly step: DecodeStep
  readonly drafter: Drafter
  readonly memory: DraftMemory
}

/**
 * Generates texts one after the other over one cache. If a prompt starts with the previous text (prompt and generated tokens), only the rest is processed. Pass the whole conversation at every turn. Returned by
 * `DeepSeek.session`.
 */
export class Session {
  readonly #model: Network
  readonly #options: SessionOptions
  readonly #once: boolean
  readonly #depth: number
  #parts: Parts | null = null
  /** The cached tokens, which must be computed again with other weights. */
  #tokens: readonly number[] = []
  readonly #weights: WeightWatch
  /** Hidden states of the latest pass, which the MTP modules draft from. Kept here, not in the generator, because its reader may abandon it. */
  #hidden: Tensor | null = null
  /** `working`: a pass may be in progress. `waiting`: the reader has not requested the next token. */
  #state: 'idle' | 'working' | 'waiting' = 'idle'
  #disposed = false

  /** Internal: see `DeepSeek.session`. With `once`, the session is for a single text and keeps nothing afterwards. */
  constructor(model: Network, options: SessionOptions, once = false) {
    checkOptions('session', options, sessionNames)
    if (options.precision !== undefined) checkPrecision('session', options.precision)
    this.#model = model
    this.#weights = new WeightWatch(model)
    this.#options = options
    this.#once = once
    this.#depth = draftDepth('session', model, options.speculative)
  }

  /**
   * Continues a sequence of token ids, as `DeepSeek.generate`; `stats.cachedTokens` counts the tokens that were cached. Results equal those of processing all tokens again up to rounding, since the order of summation may
   * depend on the length of a pass. Only one text can be generated at a time, until it ends or its reader stops.
   * @throws MoeError E_ATTR for invalid arguments, and while another text is being generated; E_DISPOSED
   */
  generate(ids: ArrayLike<number>, options: TextTurnOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: TurnOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: TurnOptions | TextTurnOptions = {}): Generation<number | string> {
    checkOptions<Partial<TextTurnOptions>>('generate', options, turnNames)
    this.#needAlive()
    return generation(this.#model.config, this.#depth, ids, options, (tokens, report, limits) =>
      this.#decode(tokens, { ...options, ...limits }, report),
    )
  }

  /** Frees the cache. A text that is being generated fails with E_DISPOSED. */
  dispose(): void {
    this.#disposed = true
    // A pass in progress needs the memory and frees it when it ends.
    if (this.#state !== 'working') this.#forget()
  }

  #needAlive(): void {
    if (!this.#disposed) return
    const fix = 'create another one with model.session()'
    throw new MoeError({ code: 'E_DISPOSED', op: 'generate', problem: 'the session was disposed', fix })
  }

  async *#decode(tokens: number[], options: LimitedTurn, report: TextReport): AsyncGenerator<number> {
    const { maxTokens, signal, onToken, logProbs, promptLogProbs } = options
    const { stats } = report
    const prompt = tokens.length
    const ends = new Set<number | string>([...endTokens(this.#model.config), ...(options.stop ?? [])])
    const random = new Random(options.seed ?? 0)
    const occurrences = new Occurrences(tokens, options)
    /** Number of latest hidden states of accepted tokens that the modules have not processed. */
    let unseen = 0
    let aborted = false
    /** Lets signals, timers and readers run, since a backend that computes on this thread never waits. */
    const turn = async () => {
      await yieldToEventLoop()
      this.#needAlive()
      if (!signal?.aborted) return
      aborted = true
      throw new MoeError({ code: 'E_ABORTED', op: 'generate', problem: 'generation was aborted', cause: signal.reason })
    }
    /** Computes the requested log-probabilities of prompt tokens from the hidden states before them. */
    const reportPrompt = async (hidden: Tensor) => {
      if (promptLogProbs === undefined) return
      const known = report.promptLogProbs.length
      const behind = tokens.slice(known, Math.min(known + hidden.shape[1], prompt))
      const how = { from: 0, top: promptLogProbs, precision: this.#precision }
      report.promptLogProbs.push(...(await logProbsBehind(this.#model, hidden, behind, how)))
    }
    this.#begin()
    try {
      const parts = this.#ready(tokens, options)
      const { cache, step } = parts
      step.scoring = options
      stats.cachedTokens = cache.lengths[0]
      let pending = tokens.slice(stats.cachedTokens)
      let drafts: number[] = []
      // The memory of a pass grows with its tokens, so long prompts are split. With maxTokens 0, the prompt is only processed if its log-probabilities are requested.
      const least = maxTokens > 0 ? limits.prefillChunkSize : promptLogProbs === undefined ? Infinity : 0
      while (pending.length > least) {
        await turn()
        const piece = pending.splice(0, limits.prefillChunkSize)
        this.#hidden = (await step.run(piece, 1)).hidden
        await reportPrompt(this.#hidden)
        await this.#draft(parts, this.#hidden, piece.length, tokens)
        this.#hidden.dispose()
      }
      if (maxTokens === 0) stats.finishReason = 'length'
      while (stats.tokens < maxTokens) {
        await turn()
        const before = cache.lengths[0]
        const ids = [...pending, ...drafts]
        const { rows, hidden, logits } = await step.run(ids, drafts.length + 1, logProbs !== undefined)
        this.#hidden = hidden
        let made: number[]
        let likely: TokenLogProb[] | undefined
        try {
          made = await nextTokens(rows, drafts, { options, random, occurrences, ends, stats })
          likely = logits && (await logProbsOf(logits, made, logProbs as number))
        } finally {
          logits?.dispose()
        }
        if (stats.steps === 0) await reportPrompt(hidden)
        stats.steps++
        const confirmed = pending.length + made.length - 1
        cache.truncate(before + confirmed)
        tokens.push(...made)
        unseen = confirmed
        for (const [i, token] of made.entries()) {
          if (likely) report.logProbs.push(likely[i])
          if (ends.has(token)) {
            stats.finishReason = 'stop'
            return
          }
          stats.tokens++
          if (stats.tokens >= maxTokens) stats.finishReason = 'length'
          onToken?.(token)
          this.#state = 'waiting'
          yield token
          this.#state = 'working'
          this.#needAlive()
          if (stats.tokens >= maxTokens) return
        }
        pending = [made[made.length - 1]]
        unseen = 0
        drafts = await this.#draft(parts, hidden, confirmed, tokens)
        hidden.dispose()
      }
    } catch (error) {
      // After an abort between two passes the state is consistent; after other errors it is unknown.
      if (!aborted) this.#forget()
      throw error
    } finally {
      // Runs also if the reader stops early.
      this.#state = 'working'
      if (this.#hidden !== null && unseen > 0 && !this.#once) await this.#catchUp(this.#hidden, unseen, tokens)
      this.#hidden?.dispose()
      this.#hidden = null
      if (this.#disposed || this.#once) this.#forget()
      this.#tokens = tokens.slice(0, this.#parts?.cache.lengths[0] ?? 0)
      this.#state = 'idle'
    }
  }

  get #precision(): Precision {
    return this.#options.precision ?? defaultPrecision(this.#model)
  }

  #begin(): void {
    if (this.#state !== 'idle') {
      throw new MoeError({
        code: 'E_ATTR',
        op: 'generate',
        problem: 'another text of this session is being generated',
        fix: 'read it to its end or leave the loop; use one session per text to generate several at once',
      })
    }
    this.#needAlive()
    this.#state = 'working'
  }

  /** Prepares the cache: keeps the tokens that it shares with the new text, and reserves room for the others and for generated ones. */
  #ready(tokens: readonly number[], { maxTokens, promptLogProbs }: LimitedTurn): Parts {
    if (this.#weights.changed()) this.#forget()
    const room = tokens.length + Math.min(maxTokens, 512) + this.#depth + 1
    const parts = this.#parts ?? this.#make(2 ** Math.ceil(Math.log2(Math.max(64, room))))
    const { cache, memory } = parts
    const start = promptLogProbs === undefined ? this.#shared(tokens, parts) : 0
    cache.truncate(start)
    memory.forget()
    cache.reserve(room - start)
    return parts
  }

  /**
   * The number of cached tokens to reuse: the common prefix of both texts, without the last token, whose logits are needed, and without one token per module, because a module of depth k has processed the token k
   * positions ahead.
   */
  #shared(tokens: readonly number[], { cache, memory }: Parts): number {
    const known = this.#tokens
    let shared = 0
    while (shared < known.length && known[shared] === tokens[shared]) shared++
    return Math.max(0, Math.min(shared - this.#depth, tokens.length - 1, cache.lengths[0] - memory.behind))
  }

  #make(capacity: number): Parts {
    const model = this.#model
    const { cacheDtype: dtype } = this.#options
    const precision = this.#precision
    const cache = model.makeCache({ capacity, dtype, depth: this.#depth })
    const drafter = new Drafter(model, this.#depth, precision)
    this.#parts = {
      cache,
      drafter,
      memory: new DraftMemory(),
      step: new DecodeStep(model, cache, precision),
    }
    return this.#parts
  }

  async #draft({ cache, drafter, memory }: Parts, hidden: Tensor, confirmed: number, tokens: readonly number[]) {
    const [drafts] = await drafter.draft(cache, hidden, [{ tokens, confirmed, memory }])
    return drafts
  }

  /** Lets the modules process what the last pass added. Otherwise the next text could only reuse the tokens before that pass. */
  async #catchUp(hidden: Tensor, confirmed: number, tokens: readonly number[]): Promise<void> {
    try {
      if (!this.#disposed && this.#parts !== null) await this.#draft(this.#parts, hidden, confirmed, tokens)
    } catch {
      this.#forget()
    }
  }

  #forget(): void {
    const { step, cache, drafter, memory } = this.#parts ?? {}
    step?.dispose()
    cache?.dispose()
    drafter?.dispose()
    memory?.forget()
    this.#hidden?.dispose()
    this.#hidden = null
    this.#parts = null
    this.#tokens = []
  }
}

/** Internal: see `DeepSeek.generate`. */
export function generate(
  model: Network,
  prompt: ArrayLike<number>,
  options: TurnOptions & SessionOptions,
): Generation<number | string> {
  checkOptions<Partial<TextTurnOptions & SessionOptions>>('generate', options, { ...turnNames, ...sessionNames })
  const { speculative, cacheDtype, precision, ...turn } = options
  return new Session(model, { speculative, cacheDtype, precision }, true).generate(prompt, turn)
}
