/**
 * @file Continuous batching over one paged cache: each pass processes a token, and its drafts, of every running text, so that weights are read once for all of them
 * (Yu et al. 2022, "Orca"). Texts are added and removed between passes.
 */
import type { PagedCache, PagedSequence } from '@moe/attention-mla'
import {
  checkOptions,
  checkPrecision,
  MoeError,
  type OptionNames,
  type Precision,
  type Tensor,
  yieldToEventLoop,
} from '@moe/core'
import { BatchStep } from './batch-step.ts'
import { BatchText, chosenTokens, type Made } from './batch-text.ts'
import { endTokens } from './config.ts'
import { defaultPrecision } from './default-precision.ts'
import { Drafter, draftDepth } from './drafter.ts'
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
import { WeightWatch } from './weight-watch.ts'

/** Options of `DeepSeek.continuousBatch`. */
export interface ContinuousBatchOptions extends SessionOptions {
  /** Maximum number of texts that are generated at once; further ones wait. Default 8. */
  readonly maxTexts?: number | undefined
  /**
   * Maximum number of cached tokens of all texts, including prompts; memory is allocated when needed. A single text that reaches this size ends, as at `maxTokens`.
   * Default: the model's context length, or 2048 per text if that is more.
   */
  readonly cacheTokens?: number | undefined
  /** Maximum number of prompt tokens per pass. Between these passes, the other texts get their tokens. Default 512. */
  readonly prefillChunkSize?: number | undefined
}

const names: OptionNames<ContinuousBatchOptions> = {
  ...sessionNames,
  maxTexts: true,
  cacheTokens: true,
  prefillChunkSize: true,
}

const refused = (code: 'E_ATTR' | 'E_DISPOSED' | 'E_OUT_OF_MEMORY', problem: string, fix?: string) =>
  new MoeError({ code, op: 'generate', problem, fix })

/** Generates several texts at once. Returned by `DeepSeek.continuousBatch`. */
export class ContinuousBatch {
  readonly #model: Network
  readonly #cache: PagedCache
  readonly #step: BatchStep
  readonly #drafter: Drafter
  readonly #maxTexts: number
  readonly #prefillChunkSize: number
  readonly #precision: Precision
  readonly #weights: WeightWatch
  /** In the order of their arrival. */
  readonly #running: BatchText[] = []
  readonly #waiting: BatchText[] = []
  #working = false
  /** The texts of the pass that is in progress. */
  #passing: readonly BatchText[] = []
  #disposed = false

  /** Internal: see `DeepSeek.continuousBatch`. */
  constructor(model: Network, options: ContinuousBatchOptions) {
    checkOptions('continuousBatch', options, names)
    const { maxTexts = 8, prefillChunkSize = 512, precision = defaultPrecision(model), cacheDtype: dtype } = options
    const { cacheTokens: tokens = Math.max(model.config.max_position_embeddings, 2048 * maxTexts) } = options
    for (const [name, value] of Object.entries({ maxTexts, prefillChunkSize, cacheTokens: tokens })) {
      if (!Number.isInteger(value) || value < 1) {
        throw new MoeError({
          code: 'E_ATTR',
          op: 'continuousBatch',
          problem: `${name} = ${value}, expected a positive integer`,
        })
      }
    }
    checkPrecision('continuousBatch', precision)
    this.#model = model
    this.#maxTexts = maxTexts
    this.#prefillChunkSize = prefillChunkSize
    this.#precision = precision
    const depth = draftDepth('continuousBatch', model, options.speculative)
    this.#cache = model.makePagedCache({ tokens, dtype, depth })
    this.#step = new BatchStep(model, precision)
    this.#drafter = new Drafter(model, depth, precision)
    this.#weights = new WeightWatch(model)
  }

  /** Number of texts that are being generated. */
  get running(): number {
    return this.#running.length
  }

  /** Number of texts that wait for their turn. */
  get waiting(): number {
    return this.#waiting.length
  }

  /**
   * Continues a sequence of token ids, as `DeepSeek.generate`, together with the other texts. `stats.cachedTokens` counts the tokens that were cached, from texts with the same beginning. Results equal those of a single text up to
   * rounding. Tokens are generated whether they are read or not; leave the loop that reads them to stop.
   * @throws MoeError E_ATTR for invalid arguments; E_DISPOSED; E_OUT_OF_MEMORY if one text does not fit in memory
   */
  generate(ids: ArrayLike<number>, options: TextTurnOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: TurnOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: TurnOptions | TextTurnOptions = {}): Generation<number | string> {
    checkOptions<Partial<TextTurnOptions>>('generate', options, turnNames)
    this.#needAlive()
    const result = generation(this.#model.config, this.#drafter.depth, ids, options, (tokens, report, limits) =>
      this.#text(tokens, { ...options, ...limits }, report),
    )
    const { tokens } = this.#cache
    if (ids.length <= tokens) return result
    const problem = `the prompt has ${ids.length} tokens, but the cache has room for only ${tokens}`
    throw refused('E_ATTR', problem, 'set a larger cacheTokens in continuousBatch, or shorten the prompt')
  }

  /** Frees the cache. Texts that are being generated fail with E_DISPOSED. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    for (const text of [...this.#running, ...this.#waiting]) {
      text.fail(disposed())
      this.#end(text)
    }
    // A pass in progress needs the memory and frees it when it ends.
    if (this.#passing.length === 0) this.#free()
  }

  #free(): void {
    this.#step.dispose()
    this.#drafter.dispose()
    this.#cache.dispose()
  }

  #needAlive(): void {
    if (this.#disposed) throw disposed()
  }

  /** The generator that the reader iterates over. */
  async *#text(tokens: number[], options: TurnOptions & TextLimits, report: TextReport): AsyncGenerator<number> {
    const { signal, onToken, maxTokens, promptLogProbs } = options
    const { stats } = report
    this.#needAlive()
    if (maxTokens === 0 && (promptLogProbs === undefined || tokens.length === 1)) {
      stats.finishReason = 'length'
      return
    }
    // The last generated token is not added to the cache.
    const most = Math.min(maxTokens, this.#cache.tokens - tokens.length + 1)
    const text = new BatchText(tokens, options, report, {
      ends: endTokens(this.#model.config),
      most,
    })
    // At once, even if the reader is busy elsewhere.
    const abort = () => {
      this.#end(text)
      text.wake()
    }
    signal?.addEventListener('abort', abort)
    this.#waiting.push(text)
    this.#work()
    try {
      for (;;) {
        if (signal?.aborted) {
          throw new MoeError({
            code: 'E_ABORTED',
            op: 'generate',
            problem: 'generation was aborted',
            cause: signal.reason,
          })
        }
        const next = text.ready.shift()
        if (next !== undefined) {
          const { token, likely } = next
          stats.tokens++
          if (likely) report.logProbs.push(likely)
          onToken?.(token)
          yield token
        } else if (text.failure) throw text.failure.error
        else if (text.finished) {
          stats.finishReason = text.finished
          if (text.end) report.logProbs.push(text.end)
          return
        } else await text.changed()
      }
    } finally {
      signal?.removeEventListener('abort', abort)
      this.#end(text)
    }
  }

  /** Runs passes while there are texts. */
  async #work(): Promise<void> {
    if (this.#working) return
    this.#working = true
    try {
      for (;;) {
        // Let signals, timers and readers run.
        await yieldToEventLoop()
        if (this.#disposed || this.#running.length + this.#waiting.length === 0) return
        this.#followWeights()
        this.#admit()
        await this.#readPrompt()
        if (!this.#disposed) await this.#makeTokens()
      }
    } catch (error) {
      for (const text of [...this.#running, ...this.#waiting]) {
        text.fail(error)
        this.#end(text)
      }
    } finally {
      this.#working = false
    }
  }

  /** Cache entries of other weights must not be shared. */
  #followWeights(): void {
    if (this.#weights.changed()) this.#cache.clearPrefixes()
  }

  #admit(): void {
    const { available, pageSize } = this.#cache
    let room = available
    while (this.#running.length < this.#maxTexts) {
      const [text] = this.#waiting
      if (text === undefined) return
      room -= text.tokens.length + pageSize
      // Leave a text waiting if it would soon be preempted.
      if (room < 0 && this.#running.length > 0) return
      this.#running.push(text)
      this.#waiting.shift()
    }
  }

  /** Processes a piece of the first unfinished prompt and, with its last piece, generates the first token. */
  async #readPrompt(): Promise<void> {
    const text = this.#running.find(({ pending }) => pending > 1)
    if (text === undefined) return
    const sequence = this.#started(text)
    const start = sequence.length
    // The last token of a preempted text is processed together with its drafts.
    const count = Math.min(this.#prefillChunkSize, text.pending - (text.drafts.length > 0 ? 1 : 0))
    if (!this.#reserve(text, start + count)) return
    const scored = start + count === text.tokens.length && text.most > 0
    await this.#pass([text], text.tokens.slice(start, start + count), scored ? 1 : 0)
  }

  /** Generates tokens for all texts whose other tokens are cached. Texts of the same kind share a pass. */
  async #makeTokens(): Promise<void> {
    const ready = new Map<string, BatchText[]>()
    for (const text of [...this.#running]) {
      if (text.pending !== 1 || !this.#running.includes(text)) continue
      const { length } = this.#started(text)
      if (length + 1 + text.drafts.length > this.#cache.tokens) text.drafts = []
      if (!this.#reserve(text, length + 1 + text.drafts.length)) continue
      const kind = `${text.drafts.length} ${text.memory.kind} ${text.options.vocabulary}`
      ready.set(kind, [...(ready.get(kind) ?? []), text])
    }
    for (const group of ready.values()) {
      // Texts may have been preempted meanwhile, or abandoned by their readers.
      const texts = group.filter(({ sequence }) => sequence !== null)
      const ids = texts.flatMap(({ tokens, drafts }) => [tokens[tokens.length - 1], ...drafts])
      if (texts.length > 0 && !this.#disposed) await this.#pass(texts, ids, ids.length / texts.length)
    }
  }

  #started(text: BatchText): PagedSequence {
    if (text.sequence === null) {
      text.sequence = this.#cache.start(text.shareable)
      if (text.made === 0) text.report.stats.cachedTokens = text.sequence.length
    }
    return text.sequence
  }

  /** Reserves pages for a text. If there are none, the most recent texts are preempted; returns false if the text is one of them. */
  #reserve(text: BatchText, tokens: number): boolean {
    const sequence = text.sequence as PagedSequence
    while (!this.#cache.reserve(sequence, tokens)) {
      const last = this.#running[this.#running.length - 1]
      if (this.#running.length === 1) {
        const problem = `there is memory for ${this.#cache.tokens} tokens, but the text has ${tokens}`
        last.fail(refused('E_OUT_OF_MEMORY', problem, 'set cacheDtype to bf16, or reduce maxTokens'))
        this.#end(last)
        return false
      }
      this.#running.pop()
      this.#release(last)
      this.#waiting.unshift(last)
      if (last === text) return false
    }
    return true
  }

  /** Processes tokens of several texts, the same number of each (`ids` row by row), and appends what follows the last `rows` of each, where the drafts are last. */
  async #pass(texts: readonly BatchText[], ids: readonly number[], rows: number): Promise<void> {
    let made: ReadonlyArray<readonly Made[]> = []
    this.#passing = texts
    try {
      made = await this.#advance(texts, ids, rows)
    } catch (error) {
      for (const text of texts) text.fail(error)
    }
    this.#passing = []
    for (const [b, text] of texts.entries()) {
      // The reader may have left during the pass.
      if (text.failure !== null || !this.#running.includes(text)) this.#end(text)
      else {
        this.#cache.share(text.sequence as PagedSequence, text.tokens)
        if (rows > 0) this.#deliver(text, made[b])
        else if (text.most === 0 && text.pending <= 1) this.#finish(text, 'length')
      }
    }
    if (this.#disposed) this.#free()
  }

  /** Runs a pass, accepts drafts and samples tokens, and drafts again. Afterwards cache and text contain only accepted tokens. */
  async #advance(texts: readonly BatchText[], ids: readonly number[], rows: number): Promise<Made[][]> {
    const batch = this.#cache.batch(texts.map(({ sequence }) => sequence as PagedSequence))
    const starts = Array.from(batch.lengths)
    const time = ids.length / texts.length
    const options = texts.map(({ options }) => options)
    const { hidden, logits, scores } = await this.#step.run(batch, ids, rows, options)
    try {
      const made = await Promise.all(texts.map((text, b) => chosenTokens(text, scores[b])))
      await this.#reportPrompt(texts[0], starts[0], hidden)
      const likely = logits && (await this.#likely(logits, made, rows, options))
      const drafted = texts.map(({ tokens, memory }, b) => {
        tokens.push(...made[b])
        return { tokens, memory, confirmed: rows === 0 ? time : time - rows + made[b].length }
      })
      batch.truncate(starts.map((start, b) => start + drafted[b].confirmed))
      const drafts = await this.#drafter.draft(batch, hidden, drafted)
      if (rows > 0) for (const [b, text] of texts.entries()) text.drafts = drafts[b]
      return made.map((tokens, b) => tokens.map((token, i) => ({ token, likely: likely?.[b]?.[i] })))
    } finally {
      hidden.dispose()
      logits?.dispose()
    }
  }

  /** Log-probabilities of the generated tokens from logits `[B * rows, V]`, for the texts that request them. */
  async #likely(
    logits: Tensor,
    made: ReadonlyArray<readonly number[]>,
    rows: number,
    options: readonly TurnOptions[],
  ): Promise<Array<TokenLogProb[] | undefined>> {
    const most = Math.max(...options.map(({ logProbs = -1 }) => logProbs))
    if (most < 0) return []
    const all = made.flatMap(tokens => Array.from({ length: rows }, (_, i) => tokens[i] ?? 0))
    const likely = await logProbsOf(logits, all, most)
    return options.map(({ logProbs }, b) => {
      if (logProbs === undefined) return undefined
      const own = likely.slice(b * rows, (b + 1) * rows)
      return own.map(one => ({ ...one, top: one.top.slice(0, logProbs) }))
    })
  }

  /** Computes the requested log-probabilities of prompt tokens from the hidden states before them. */
  async #reportPrompt(text: BatchText, start: number, hidden: Tensor): Promise<void> {
    const { promptLogProbs: top } = text.options
    const { promptLogProbs: report } = text.report
    if (top === undefined) return
    const behind = text.tokens.slice(report.length, Math.min(text.prompt, start + hidden.shape[1] + 1))
    const how = { from: report.length - 1 - start, top, precision: this.#precision }
    report.push(...(await logProbsBehind(this.#model, hidden, behind, how)))
  }

  /** Passes tokens to the reader, up to the end of the text. */
  #deliver(text: BatchText, made: readonly Made[]): void {
    text.report.stats.steps++
    for (const each of made) {
      if (text.ends.has(each.token)) {
        text.end = each.likely
        this.#finish(text, 'stop')
        return
      }
      text.ready.push(each)
      text.made++
      if (text.made >= text.most) {
        this.#finish(text, 'length')
        return
      }
    }
    text.wake()
  }

  #finish(text: BatchText, reason: 'stop' | 'length'): void {
    text.finished = reason
    this.#end(text)
    text.wake()
  }

  /** Removes a text from the batch. */
  #end(text: BatchText): void {
    for (const list of [this.#running, this.#waiting]) {
      const at = list.indexOf(text)
      if (at >= 0) list.splice(at, 1)
    }
    this.#release(text)
  }

  #release(text: BatchText): void {
    // The pass in progress needs its pages and releases them afterwards.
    if (this.#passing.includes(text)) return
    if (text.sequence !== null) this.#cache.release(text.sequence)
    text.sequence = null
    text.memory.forget()
  }
}

const disposed = () =>
  refused('E_DISPOSED', 'the batch was disposed', 'create another one with model.continuousBatch()')
