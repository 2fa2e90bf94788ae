/** @file Texts token by token over one cache, optionally with MTP modules drafting ahead. Each reads only what it does not share with the one before. */
import type { KvCache } from '@moe/attention-mla'
import {
  checkOptions,
  checkPrecision,
  eventLoopTurn,
  isMoeError,
  MoeError,
  namedParameters,
  type Parameter,
  type Precision,
  Random,
  type Tensor,
} from '@moe/core'
import { endTokens } from './config.ts'
import { DecodeStep } from './decode-step.ts'
import { Drafter, DraftMemory } from './drafter.ts'
import {
  type Generation,
  generation,
  type SessionOptions,
  sessionNames,
  type TextLimits,
  type TextTurnOptions,
  type Told,
  type TurnOptions,
  turnNames,
} from './generate.ts'
import { logProbsBehind, logProbsOf } from './log-probs.ts'
import type { DeepSeek } from './model.ts'
import { follow } from './sampling.ts'
import { usualPrecision } from './usual-precision.ts'

/** Most tokens of a prompt in one pass. Tests make it small. */
export const limits = { promptPiece: 2048 }

type LimitedTurn = TurnOptions & TextLimits

/** What holds memory. */
interface Parts {
  readonly cache: KvCache
  readonly step: DecodeStep
  readonly drafter: Drafter
  readonly memory: DraftMemory
}

/**
 * Makes texts, one after the other, over one cache: of a prompt that begins as the last text went (its prompt and what was made of it), only the rest is read. A
 * conversation is passed whole at every turn. Made by `DeepSeek.session`.
 */
export class Session {
  readonly #model: DeepSeek
  readonly #options: SessionOptions
  readonly #once: boolean
  readonly #depth: number
  #parts: Parts | null = null
  /** What the cache holds, and the weights that it is of. */
  #tokens: readonly number[] = []
  #weights: ReadonlyArray<readonly [Parameter, number]> = []
  /** Of the latest pass, which modules draft from. Not the text's: whoever reads that may leave it for good. */
  #hidden: Tensor | null = null
  /** Whether a text is being made; then whether a pass may be under way, or all wait for whoever reads the text. */
  #state: 'idle' | 'working' | 'waiting' = 'idle'
  #disposed = false

  /** Internal: see `DeepSeek.session`. `once`: for a single text, after which nothing is kept. */
  constructor(model: DeepSeek, options: SessionOptions, once = false) {
    checkOptions('session', options, sessionNames)
    if (options.precision !== undefined) checkPrecision('session', options.precision)
    this.#model = model
    this.#options = options
    this.#once = once
    this.#depth = options.speculative ? model.mtp.length : 0
  }

  /**
   * Continues a sequence of token ids as `DeepSeek.generate` does; `stats.reused` of them were in the cache. The numbers are those of reading all anew up to
   * rounding: sums of passes of other lengths may be taken in another order. One text at a time, which ends when it does or when its reader stops.
   * @throws MoeError E_ATTR for what cannot be, and while another text is being made; E_DISPOSED
   */
  generate(ids: ArrayLike<number>, options: TextTurnOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: TurnOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: TurnOptions | TextTurnOptions = {}): Generation<number | string> {
    checkOptions<Partial<TextTurnOptions>>('generate', options, turnNames)
    this.#needAlive()
    return generation(this.#model, this.#depth, ids, options, (tokens, told, limits) =>
      this.#decode(tokens, { ...options, ...limits }, told),
    )
  }

  /** Frees the cache. A text that is being made ends with E_DISPOSED. */
  dispose(): void {
    this.#disposed = true
    // A pass that is under way needs its memory: it is freed behind it.
    if (this.#state !== 'working') this.#forget()
  }

  #needAlive(): void {
    if (!this.#disposed) return
    const fix = 'make another one: model.session()'
    throw new MoeError({ code: 'E_DISPOSED', op: 'generate', problem: 'the session was disposed', fix })
  }

  async *#decode(tokens: number[], options: LimitedTurn, told: Told): AsyncGenerator<number> {
    const { maxTokens, signal, onToken, logProbs, promptLogProbs } = options
    const { stats } = told
    const prompt = tokens.length
    const ends = new Set<number | string>([...endTokens(this.#model.config), ...(options.stop ?? [])])
    const random = new Random(options.seed ?? 0)
    const known = new Set(tokens)
    /** Positions of the latest hidden states that stand and that no module has seen. */
    let unseen = 0
    /** A backend that computes on this thread never waits: signals, timers and whoever reads the tokens get their turn here. */
    const turn = async () => {
      await eventLoopTurn()
      this.#needAlive()
      if (!signal?.aborted) return
      throw new MoeError({ code: 'E_ABORTED', op: 'generate', problem: 'was aborted', cause: signal.reason })
    }
    /** Of tokens of the prompt, what the hidden states before them say. */
    const tellPrompt = async (hidden: Tensor) => {
      if (promptLogProbs === undefined) return
      const known = told.promptLogProbs.length
      const behind = tokens.slice(known, Math.min(known + hidden.shape[1], prompt))
      const how = { from: 0, top: promptLogProbs, precision: this.#precision }
      told.promptLogProbs.push(...(await logProbsBehind(this.#model, hidden, behind, how)))
    }
    this.#begin()
    try {
      const parts = this.#ready(tokens, options)
      const { cache, step } = parts
      step.scoring = options
      stats.reused = cache.lengths[0]
      let pending = tokens.slice(stats.reused)
      let drafts: number[] = []
      // What a pass needs grows with its tokens: a long prompt goes through in pieces. Where nothing is made, all of it, if anybody wants to know of it.
      const least = maxTokens > 0 ? limits.promptPiece : promptLogProbs === undefined ? Infinity : 0
      while (pending.length > least) {
        await turn()
        const piece = pending.splice(0, limits.promptPiece)
        this.#hidden = (await step.run(piece, 1)).hidden
        await tellPrompt(this.#hidden)
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
        const made = await follow(rows, drafts, { options, random, known, ends, stats })
        const likely = logits && (await logProbsOf(logits, made, logProbs as number).finally(() => logits.dispose()))
        if (stats.steps === 0) await tellPrompt(hidden)
        stats.steps++
        const confirmed = pending.length + made.length - 1
        cache.truncate(before + confirmed)
        tokens.push(...made)
        unseen = confirmed
        for (const [i, token] of made.entries()) {
          if (likely) told.logProbs.push(likely[i])
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
      // After an abort all is as it was between two passes; after other failures nobody knows.
      if (!isMoeError(error, 'E_ABORTED')) this.#forget()
      throw error
    } finally {
      // Also when whoever reads the tokens stops early.
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
    return this.#options.precision ?? usualPrecision(this.#model)
  }

  #begin(): void {
    if (this.#state !== 'idle') {
      throw new MoeError({
        code: 'E_ATTR',
        op: 'generate',
        problem: 'another text of this session is being made',
        fix: 'read it to its end, or leave the loop that reads it; several at once need a session each',
      })
    }
    this.#needAlive()
    this.#state = 'working'
  }

  /** The parts, with as many of the tokens in their caches as stand, and room for the others and for what is made of them. */
  #ready(tokens: readonly number[], { maxTokens, promptLogProbs }: LimitedTurn): Parts {
    const weights = namedParameters(this.#model).map(({ parameter }) => [parameter, parameter.version] as const)
    const same = weights.every(([parameter, version], i) => {
      const [known, before] = this.#weights[i] ?? []
      return parameter === known && version === before
    })
    if (!same) this.#forget()
    this.#weights = weights
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
   * Where reading begins: behind what both texts share, but for the last token, whose logits are wanted, and as many as there are modules: a module of depth k
   * has seen the token k places ahead.
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

  /** Shows the modules what the last pass added, which nothing is drafted from any more: without it the next text would be read from before that pass. */
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
  model: DeepSeek,
  prompt: ArrayLike<number>,
  options: TurnOptions & SessionOptions,
): Generation<number | string> {
  checkOptions<Partial<TextTurnOptions & SessionOptions>>('generate', options, { ...turnNames, ...sessionNames })
  const { speculative, cacheDtype, precision, ...turn } = options
  return new Session(model, { speculative, cacheDtype, precision }, true).generate(prompt, turn)
}
