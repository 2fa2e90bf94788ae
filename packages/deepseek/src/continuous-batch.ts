/**
 * @file Many texts at once over one paged cache: each pass has a token of every text that is being made, and its drafts, so that weights are read once for all of them
 * (Yu et al. 2022, "Orca"). Texts come and go between two passes.
 */
import type { PagedCache, PagedSequence } from '@moe/attention-mla'
import {
  checkOptions,
  checkPrecision,
  eventLoopTurn,
  MoeError,
  namedParameters,
  type OptionNames,
  type Parameter,
  type Precision,
  Random,
  type Tensor,
} from '@moe/core'
import { BatchStep } from './batch-step.ts'
import { endTokens } from './config.ts'
import { Drafter, DraftMemory } from './drafter.ts'
import {
  type Generation,
  type GenerationStats,
  generation,
  type SessionOptions,
  sessionNames,
  type TextLimits,
  type TextTurnOptions,
  type Told,
  type TurnOptions,
  turnNames,
} from './generate.ts'
import { logProbsBehind, logProbsOf, type TokenLogProb } from './log-probs.ts'
import type { DeepSeek } from './model.ts'
import { follow, type Scores, type Scoring } from './sampling.ts'
import { usualPrecision } from './usual-precision.ts'

/** Room for texts that are made at the same time. */
export interface ContinuousBatchOptions extends SessionOptions {
  /** Most texts at once; further ones wait for their turn. Default 8. */
  readonly maxTexts?: number
  /**
   * Most tokens that the cache holds for all texts, prompts included; memory is taken as they need it. A text that alone has as many ends there, as at `maxTokens`.
   * Default: a whole context, or 2048 for each text where that is more.
   */
  readonly cacheTokens?: number
  /** Most tokens of a prompt in one pass; between two of them the other texts get their tokens. Default 512. */
  readonly promptPiece?: number
}

const names: OptionNames<ContinuousBatchOptions> = {
  ...sessionNames,
  maxTexts: true,
  cacheTokens: true,
  promptPiece: true,
}

const refused = (code: 'E_ATTR' | 'E_DISPOSED' | 'E_OUT_OF_MEMORY', problem: string, fix?: string) =>
  new MoeError({ code, op: 'generate', problem, fix })

interface Made {
  readonly token: number
  readonly likely: TokenLogProb | undefined
}

/** A text on its way. */
class Text {
  /** Prompt, and what was made of it. */
  readonly tokens: number[]
  readonly options: TurnOptions & Scoring
  readonly told: Told
  /** Tokens of the prompt. */
  readonly prompt: number
  readonly ends: ReadonlySet<number | string>
  /** Tokens that stand before, for penalties. */
  readonly known: Set<number>
  readonly random: Random
  /** Most tokens to make. */
  readonly most: number
  /** Null while it waits: it has no pages then. */
  sequence: PagedSequence | null = null
  /** What modules say follows its last token. */
  drafts: readonly number[] = []
  readonly memory = new DraftMemory()
  /** Made, and not read yet. */
  readonly ready: Made[] = []
  made = 0
  /** What is told of the token that ended it. */
  end: TokenLogProb | undefined
  /** Why nothing is made any more: for good, or by an error. */
  finished: GenerationStats['finishReason'] = null
  failure: { readonly error: unknown } | null = null
  #wake: (() => void) | null = null

  constructor(
    tokens: number[],
    options: TurnOptions & Scoring,
    told: Told,
    { ends, most }: { readonly ends: readonly number[]; readonly most: number },
  ) {
    this.tokens = tokens
    this.prompt = tokens.length
    this.most = most
    this.options = options
    this.told = told
    this.ends = new Set<number | string>([...ends, ...(options.stop ?? [])])
    this.known = new Set(tokens)
    this.random = new Random(options.seed ?? 0)
  }

  /** Tokens that the cache does not hold. */
  get pending(): number {
    return this.tokens.length - (this.sequence?.length ?? 0)
  }

  /** What may have been read for other texts: only of what is read anew it can be told how likely it is. */
  get shareable(): readonly number[] {
    const { length } = this.told.promptLogProbs
    return length > 0 && length < this.prompt ? this.tokens.slice(0, length) : this.tokens
  }

  /** Something has happened that whoever reads the text may want to know. */
  wake = (): void => {
    this.#wake?.()
    this.#wake = null
  }

  news(): Promise<void> {
    return new Promise(resolve => {
      this.#wake = resolve
    })
  }

  fail(error: unknown): void {
    this.failure = { error }
    this.wake()
  }
}

/** Texts of one model, as many at once as come. Made by `DeepSeek.continuousBatch`. */
export class ContinuousBatch {
  readonly #model: DeepSeek
  readonly #cache: PagedCache
  readonly #step: BatchStep
  readonly #drafter: Drafter
  readonly #maxTexts: number
  readonly #promptPiece: number
  readonly #precision: Precision
  readonly #parameters: readonly Parameter[]
  /** Of the weights that the cache is of. */
  #versions: readonly number[] = []
  /** The ones that came first in front. */
  readonly #running: Text[] = []
  readonly #waiting: Text[] = []
  #working = false
  /** The texts of the pass that is under way. */
  #passing: readonly Text[] = []
  #disposed = false

  /** Internal: see `DeepSeek.continuousBatch`. */
  constructor(model: DeepSeek, options: ContinuousBatchOptions) {
    checkOptions('continuousBatch', options, names)
    const { maxTexts = 8, promptPiece = 512, precision = usualPrecision(model), cacheDtype: dtype } = options
    const { cacheTokens: tokens = Math.max(model.config.max_position_embeddings, 2048 * maxTexts) } = options
    for (const [name, value] of Object.entries({ maxTexts, promptPiece, cacheTokens: tokens })) {
      if (!Number.isInteger(value) || value < 1) {
        throw new MoeError({ code: 'E_ATTR', op: 'continuousBatch', problem: `${name} = ${value} is not 1 or more` })
      }
    }
    checkPrecision('continuousBatch', precision)
    this.#model = model
    this.#maxTexts = maxTexts
    this.#promptPiece = promptPiece
    this.#precision = precision
    const depth = options.speculative ? model.mtp.length : 0
    this.#cache = model.makePagedCache({ tokens, dtype, depth })
    this.#step = new BatchStep(model, precision)
    this.#drafter = new Drafter(model, depth, precision)
    this.#parameters = namedParameters(model).map(({ parameter }) => parameter)
  }

  /** Texts that get tokens. */
  get running(): number {
    return this.#running.length
  }

  /** Texts that wait for a place. */
  get waiting(): number {
    return this.#waiting.length
  }

  /**
   * Continues a sequence of token ids as `DeepSeek.generate` does, beside the other texts that are being made; `stats.reused` of its tokens stood in
   * the cache, from texts that began alike. The numbers are those of a text alone up to rounding. Tokens are made whether they are read or not; leaving the loop
   * that reads them ends the text.
   * @throws MoeError E_ATTR for what cannot be; E_DISPOSED; E_OUT_OF_MEMORY where one text does not fit into memory
   */
  generate(ids: ArrayLike<number>, options: TextTurnOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: TurnOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: TurnOptions | TextTurnOptions = {}): Generation<number | string> {
    checkOptions<Partial<TextTurnOptions>>('generate', options, turnNames)
    this.#needAlive()
    const result = generation(this.#model, this.#drafter.depth, ids, options, (tokens, told, limits) =>
      this.#text(tokens, { ...options, ...limits }, told),
    )
    const { tokens } = this.#cache
    if (ids.length <= tokens) return result
    const problem = `the prompt has ${ids.length} tokens, and the cache has room for ${tokens}`
    throw refused('E_ATTR', problem, 'pass more cacheTokens to continuousBatch, or a shorter prompt')
  }

  /** Frees the cache. Texts that are being made end with E_DISPOSED. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    for (const text of [...this.#running, ...this.#waiting]) {
      text.fail(disposed())
      this.#end(text)
    }
    // A pass that is under way needs its memory: it is freed behind it.
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

  /** The reader's side. */
  async *#text(tokens: number[], options: TurnOptions & TextLimits, told: Told): AsyncGenerator<number> {
    const { signal, onToken, maxTokens, promptLogProbs } = options
    const { stats } = told
    this.#needAlive()
    if (maxTokens === 0 && (promptLogProbs === undefined || tokens.length === 1)) {
      stats.finishReason = 'length'
      return
    }
    // The last token that is made is not read.
    const most = Math.min(maxTokens, this.#cache.tokens - tokens.length + 1)
    const text = new Text(tokens, options, told, {
      ends: endTokens(this.#model.config),
      most,
    })
    signal?.addEventListener('abort', text.wake)
    this.#waiting.push(text)
    this.#work()
    try {
      for (;;) {
        if (signal?.aborted) {
          throw new MoeError({ code: 'E_ABORTED', op: 'generate', problem: 'was aborted', cause: signal.reason })
        }
        const next = text.ready.shift()
        if (next !== undefined) {
          const { token, likely } = next
          stats.tokens++
          if (likely) told.logProbs.push(likely)
          onToken?.(token)
          yield token
        } else if (text.failure) throw text.failure.error
        else if (text.finished) {
          stats.finishReason = text.finished
          if (text.end) told.logProbs.push(text.end)
          return
        } else await text.news()
      }
    } finally {
      signal?.removeEventListener('abort', text.wake)
      this.#end(text)
    }
  }

  /** Passes as long as there are texts. */
  async #work(): Promise<void> {
    if (this.#working) return
    this.#working = true
    try {
      for (;;) {
        // Signals, timers and readers get their turn here.
        await eventLoopTurn()
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

  /** What was read with other weights is not shared. */
  #followWeights(): void {
    if (this.#parameters.every(({ version }, i) => version === this.#versions[i])) return
    this.#versions = this.#parameters.map(({ version }) => version)
    this.#cache.forget()
  }

  #admit(): void {
    const { available, pageSize } = this.#cache
    let room = available
    while (this.#running.length < this.#maxTexts) {
      const [text] = this.#waiting
      if (text === undefined) return
      room -= text.tokens.length + pageSize
      // One that would be sent back at once waits.
      if (room < 0 && this.#running.length > 0) return
      this.#running.push(text)
      this.#waiting.shift()
    }
  }

  /** A piece of the first prompt that is not read, and behind the last piece its first token. */
  async #readPrompt(): Promise<void> {
    const text = this.#running.find(({ pending }) => pending > 1)
    if (text === undefined) return
    const sequence = this.#begun(text)
    const start = sequence.length
    // The last token of a text that was sent back goes with its drafts.
    const count = Math.min(this.#promptPiece, text.pending - (text.drafts.length > 0 ? 1 : 0))
    if (!this.#reserve(text, start + count)) return
    const scored = start + count === text.tokens.length && text.most > 0
    await this.#pass([text], text.tokens.slice(start, start + count), scored ? 1 : 0)
  }

  /** What follows the last token of each text that all others of are in the cache. Those that go on alike share a pass. */
  async #makeTokens(): Promise<void> {
    const ready = new Map<string, Text[]>()
    for (const text of [...this.#running]) {
      if (text.pending !== 1 || !this.#running.includes(text)) continue
      const { length } = this.#begun(text)
      if (length + 1 + text.drafts.length > this.#cache.tokens) text.drafts = []
      if (!this.#reserve(text, length + 1 + text.drafts.length)) continue
      const kind = `${text.drafts.length} ${text.memory.kind} ${text.options.vocabulary}`
      ready.set(kind, [...(ready.get(kind) ?? []), text])
    }
    for (const alike of ready.values()) {
      // They may have been sent back for the ones behind them, or their readers have left.
      const texts = alike.filter(({ sequence }) => sequence !== null)
      const ids = texts.flatMap(({ tokens, drafts }) => [tokens[tokens.length - 1], ...drafts])
      if (texts.length > 0 && !this.#disposed) await this.#pass(texts, ids, ids.length / texts.length)
    }
  }

  #begun(text: Text): PagedSequence {
    if (text.sequence === null) {
      text.sequence = this.#cache.start(text.shareable)
      if (text.made === 0) text.told.stats.reused = text.sequence.length
    }
    return text.sequence
  }

  /** Pages for so many tokens of a text. The texts that came last are sent back to wait, as it may be itself: false then. */
  #reserve(text: Text, tokens: number): boolean {
    const sequence = text.sequence as PagedSequence
    while (!this.#cache.reserve(sequence, tokens)) {
      const last = this.#running[this.#running.length - 1]
      if (this.#running.length === 1) {
        const problem = `there is memory for ${this.#cache.tokens} tokens, and the text has ${tokens}`
        last.fail(refused('E_OUT_OF_MEMORY', problem, 'pass a cacheDtype of bf16, or fewer maxTokens'))
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

  /** As many more tokens of each text, `ids` row by row, through the model. What follows the last `rows` of each, its drafts behind them, is added to it. */
  async #pass(texts: readonly Text[], ids: readonly number[], rows: number): Promise<void> {
    let made: ReadonlyArray<readonly Made[]> = []
    this.#passing = texts
    try {
      made = await this.#goOn(texts, ids, rows)
    } catch (error) {
      for (const text of texts) text.fail(error)
    }
    this.#passing = []
    for (const [b, text] of texts.entries()) {
      // Its reader may have left meanwhile.
      if (text.failure !== null || !this.#running.includes(text)) this.#end(text)
      else {
        this.#cache.share(text.sequence as PagedSequence, text.tokens)
        if (rows > 0) this.#deliver(text, made[b])
        else if (text.most === 0 && text.pending <= 1) this.#finish(text, 'length')
      }
    }
    if (this.#disposed) this.#free()
  }

  /** What the pass makes of each text. In the cache and in the text is then what stands, and its next drafts are there. */
  async #goOn(texts: readonly Text[], ids: readonly number[], rows: number): Promise<Made[][]> {
    const batch = this.#cache.batch(texts.map(({ sequence }) => sequence as PagedSequence))
    const starts = Array.from(batch.lengths)
    const time = ids.length / texts.length
    const options = texts.map(({ options }) => options)
    const { hidden, logits, scores } = await this.#step.run(batch, ids, rows, options)
    try {
      const made = await Promise.all(texts.map((text, b) => follows(text, scores[b])))
      await this.#tellPrompt(texts[0], starts[0], hidden)
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

  /** Of each text that asks for it, how likely its made tokens are by logits `[B * rows, V]`. */
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

  /** Of tokens of its prompt, what the hidden states before them say. */
  async #tellPrompt(text: Text, start: number, hidden: Tensor): Promise<void> {
    const { promptLogProbs: top } = text.options
    const { promptLogProbs: told } = text.told
    if (top === undefined) return
    const behind = text.tokens.slice(told.length, Math.min(text.prompt, start + hidden.shape[1] + 1))
    const how = { from: told.length - 1 - start, top, precision: this.#precision }
    told.push(...(await logProbsBehind(this.#model, hidden, behind, how)))
  }

  /** To its reader, as far as the text goes. */
  #deliver(text: Text, made: readonly Made[]): void {
    text.told.stats.steps++
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

  #finish(text: Text, reason: 'stop' | 'length'): void {
    text.finished = reason
    this.#end(text)
    text.wake()
  }

  /** It needs its place no more. */
  #end(text: Text): void {
    for (const list of [this.#running, this.#waiting]) {
      const at = list.indexOf(text)
      if (at >= 0) list.splice(at, 1)
    }
    this.#release(text)
  }

  #release(text: Text): void {
    // The pass needs its pages, and gives them back.
    if (this.#passing.includes(text)) return
    if (text.sequence !== null) this.#cache.release(text.sequence)
    text.sequence = null
    text.memory.forget()
  }
}

/** The tokens that a text goes on with. A constraint that fails ends its own text and no other, which needs a token until the pass is over. */
async function follows(text: Text, scores: readonly Scores[]): Promise<number[]> {
  const { options, random, known, ends, drafts, told } = text
  try {
    return await follow(scores, drafts, { options, random, known, ends, stats: told.stats })
  } catch (error) {
    text.fail(error)
    return [0]
  }
}

const disposed = () => refused('E_DISPOSED', 'the batch was disposed', 'make another one: model.continuousBatch()')
