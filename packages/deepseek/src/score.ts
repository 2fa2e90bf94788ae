/** @file Log-probabilities of texts that are there. */
import type { PagedCache, PagedSequence, SequenceCache } from '@moe/attention-mla'
import {
  checkOptions,
  checkPrecision,
  eventLoopTurn,
  fromHost,
  keep,
  MoeError,
  type OptionNames,
  type Precision,
  type Tensor,
} from '@moe/core'
import { checkIds } from './generate.ts'
import { checkTop, logProbsAt, type TokenLogProb } from './log-probs.ts'
import type { DeepSeek } from './model.ts'
import { chunks, distinctRows, type Row, sharedPrefixes } from './shared-prefixes.ts'
import { usualPrecision } from './usual-precision.ts'

/** What `score` tells, and how it computes. */
export interface ScoreOptions {
  /** How many of the likeliest tokens to tell beside each. Default 0. */
  readonly top?: number
  /** Of each text, its first token that is told of; those before are null. What texts have in common before these is read once. Default 1, all of them. */
  readonly from?: readonly number[]
  /** Of matrix products. Default: bf16 where weights are stored in bf16 or fewer bits, else f32. */
  readonly precision?: Precision
  /** Stops between two passes: the promise then rejects with E_ABORTED, with the signal's reason as its cause. */
  readonly signal?: AbortSignal
  /** Is told after each pass which share of the tokens has been read. */
  readonly onProgress?: (done: number) => void
}

const names: OptionNames<ScoreOptions> = { top: true, from: true, precision: true, signal: true, onProgress: true }

/** Most tokens of a pass over several texts, and most that they attend to. Tests make them small. */
export const limits = { passTokens: 4096, passKeys: 16384 }

type Scores = Array<Array<TokenLogProb | null>>

/** Internal: see `DeepSeek.score`. */
export async function score(
  model: DeepSeek,
  texts: ReadonlyArray<ArrayLike<number>>,
  options: ScoreOptions,
): Promise<Scores> {
  checkOptions('score', options, names)
  const { top = 0, precision = usualPrecision(model), from, signal, onProgress } = options
  checkTop('score', 'top', top)
  checkPrecision('score', precision)
  checkTexts(model, texts, from)
  const result: Scores = Array.from(texts, text => new Array<null>(text.length).fill(null))
  const rows = texts.flatMap((text, i): Row[] => {
    const first = Math.max(1, from?.[i] ?? 1)
    return first < text.length ? [{ tokens: Array.from(text).slice(0, -1), from: first - 1, texts: [i] }] : []
  })
  const passes = new ScorePasses(model, precision, {
    wanted: (row, start) =>
      row.texts.flatMap(number => {
        const text = texts[number]
        const first = Math.max(1, from?.[number] ?? 1)
        return Array.from({ length: text.length - first }, (_, i) => ({
          state: first + i - 1 - start,
          token: text[first + i],
          tell: (told: TokenLogProb) => {
            result[number][first + i] = told
          },
        }))
      }),
    top,
    turn: async done => {
      onProgress?.(done)
      await eventLoopTurn()
      if (!signal?.aborted) return
      throw new MoeError({ code: 'E_ABORTED', op: 'score', problem: 'was aborted', cause: signal.reason })
    },
  })
  try {
    await passes.run(distinctRows(rows))
  } finally {
    passes.dispose()
  }
  return result
}

/** @throws MoeError E_ATTR */
function checkTexts(
  model: DeepSeek,
  texts: ReadonlyArray<ArrayLike<number>>,
  from: readonly number[] | undefined,
): void {
  const refused = (problem: string, fix: string) => new MoeError({ code: 'E_ATTR', op: 'score', problem, fix })
  if (!Array.isArray(texts as unknown)) throw refused('no list of texts is given', 'pass [ids, ...]')
  const { max_position_embeddings: context } = model.config
  for (const [i, text] of texts.entries()) {
    checkIds('score', model, text)
    // The last token is not read.
    if (text.length <= context + 1) continue
    const problem = `text ${i} has ${text.length} tokens, and the context of the model ${context}, behind which one more is told of`
    throw refused(problem, 'cut it into pieces: evaluateTask(model, tasks.text, ...) of @moe/evaluation does')
  }
  if (from === undefined) return
  const isNumber = (first: number) => Number.isInteger(first) && first >= 0
  if (Array.isArray(from as unknown) && from.length === texts.length && from.every(isNumber)) return
  const given = Array.isArray(from as unknown) ? `[${from.slice(0, 8)}]` : `${from}`
  throw refused(`from = ${given} is no list with a position for each of ${texts.length} texts`, 'pass whole numbers')
}

/** What somebody wants to know of a pass. */
interface Wanted {
  /** Number of the hidden state among those that are read of the row. */
  readonly state: number
  /** Which token behind it. */
  readonly token: number
  readonly tell: (told: TokenLogProb) => void
}

interface Asked {
  readonly top: number
  /** Of a row whose tokens from `start` on are read. */
  readonly wanted: (row: Row, start: number) => readonly Wanted[]
  /** Between two passes. */
  readonly turn: (done: number) => Promise<void>
}

/** A row on its way: the tokens from `start` on are read. */
interface Reading {
  readonly row: Row
  readonly start: number
  readonly sequence: PagedSequence | null
}

const restOf = ({ row, start }: Reading): number => row.tokens.length - start

/** Rows through the model: those that share nothing as they are, the others behind what they share, which is read before and kept in pages. */
class ScorePasses {
  readonly #model: DeepSeek
  readonly #precision: Precision
  readonly #asked: Asked
  #cache: PagedCache | null = null
  #total = 0
  #read = 0

  constructor(model: DeepSeek, precision: Precision, asked: Asked) {
    this.#model = model
    this.#precision = precision
    this.#asked = asked
  }

  /** Rows that are distinct and in order. */
  async run(rows: readonly Row[]): Promise<void> {
    this.#total = rows.reduce((sum, { tokens }) => sum + tokens.length, 0)
    const prefixes = sharedPrefixes(rows)
    const longest = rows.reduce((most, { tokens }) => Math.max(most, tokens.length), 0)
    const alone = rows.filter((_, i) => prefixes[i] === 0)
    const together = rows.filter((_, i) => prefixes[i] > 0)
    if (together.length > 0) {
      // Of a chunk what is shared, padded at most to the double, and one pass. Pages of a token: to the last one, all that is shared is.
      this.#cache = this.#model.makePagedCache({ tokens: 5 * limits.passTokens + 3 * longest, pageSize: 1 })
    }
    for (const chunk of chunks(together, 2 * limits.passTokens)) await this.#runChunk(chunk)
    await this.#pass(alone.map(row => ({ row, start: 0, sequence: null })))
  }

  /** Rows of which each shares something with another one of all. What this is stays in the cache until they are read. */
  async #runChunk(rows: readonly Row[]): Promise<void> {
    const cache = this.#cache as PagedCache
    const held: PagedSequence[] = []
    const levels: Row[][] = [rows.slice()]
    for (;;) {
      const [level] = levels
      const prefixes = sharedPrefixes(level)
      const shorter = level.flatMap(({ tokens }, i) => {
        const length = prefixes[i]
        return length === 0 ? [] : [{ tokens: tokens.slice(0, length), from: Infinity, texts: [] }]
      })
      if (shorter.length === 0) break
      levels.unshift(distinctRows(shorter))
    }
    try {
      for (const level of levels) {
        const readings = level.map(row => {
          // Nobody wants to know what follows a prefix: it may be there to its last token.
          const known = row.texts.length === 0 ? [...row.tokens, 0] : row.tokens.slice(0, row.from + 1)
          const sequence = cache.start(known)
          held.push(sequence)
          return { row, start: sequence.length, sequence }
        })
        await this.#pass(readings.filter(reading => restOf(reading) > 0))
      }
    } finally {
      for (const sequence of held) cache.release(sequence)
    }
  }

  async #pass(readings: readonly Reading[]): Promise<void> {
    for (const group of groups(readings)) {
      await this.#passTogether(group)
      this.#read += group.reduce((sum, { row }) => sum + (row.texts.length > 0 ? row.tokens.length : 0), 0)
      await this.#asked.turn(this.#read / this.#total)
    }
  }

  /** The first of them is the longest. What fills the others up stands behind them, where they do not see it. */
  async #passTogether(group: readonly Reading[]): Promise<void> {
    const time = restOf(group[0])
    const ids = Int32Array.from({ length: group.length * time }, (_, i) => {
      const { row, start } = group[Math.floor(i / time)]
      return row.tokens[start + (i % time)] ?? 0
    })
    const cache = this.#batchOf(group, time)
    const model = this.#model
    const hidden = keep(
      model.infer(() => model.hidden(fromHost(ids, [group.length, time], 'i32', model.backend), { cache }), {
        precision: this.#precision,
      }),
    )
    try {
      await this.#tell(hidden, group)
    } finally {
      hidden.dispose()
    }
    for (const { row, sequence } of group) {
      if (sequence === null) continue
      if (row.texts.length === 0) this.#cache?.share(sequence, row.tokens)
      else this.#cache?.release(sequence)
    }
  }

  #batchOf(group: readonly Reading[], time: number): SequenceCache | undefined {
    const cache = this.#cache
    if (cache === null || group[0].sequence === null) return undefined
    for (const { start, sequence } of group) {
      if (cache.reserve(sequence as PagedSequence, start + time)) continue
      const problem = `there is no memory for ${start + time} tokens of a text beside ${group.length - 1} others`
      throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'score', problem })
    }
    return cache.batch(group.map(({ sequence }) => sequence as PagedSequence))
  }

  async #tell(hidden: Tensor, group: readonly Reading[]): Promise<void> {
    const time = hidden.shape[1]
    const all = group.flatMap(({ row, start }, b) =>
      this.#asked.wanted(row, start).map(one => ({ ...one, state: b * time + one.state })),
    )
    const states = all.map(({ state }) => state)
    const tokens = all.map(({ token }) => token)
    const how = { states, top: this.#asked.top, precision: this.#precision }
    const told = await logProbsAt(this.#model, hidden, tokens, how)
    for (const [i, { tell }] of all.entries()) tell(told[i])
  }

  dispose(): void {
    this.#cache?.dispose()
  }
}

/** What goes through together, the longest first; of what is kept in pages, none less than half as long. */
function groups(readings: readonly Reading[]): Reading[][] {
  const { passTokens, passKeys } = limits
  const order = readings.toSorted((a, b) => restOf(b) - restOf(a))
  const result: Reading[][] = []
  let keys = 0
  for (const reading of order) {
    const last = result[result.length - 1] ?? []
    const rest = last.length === 0 ? Infinity : restOf(last[0])
    const rows = last.length + 1
    const most = Math.max(keys, reading.start + rest)
    const isCached = reading.sequence !== null
    const fits = rows * rest <= passTokens && (!isCached || (rows * most <= passKeys && 2 * restOf(reading) >= rest))
    if (fits) last.push(reading)
    else result.push([reading])
    keys = fits ? most : reading.start + restOf(reading)
  }
  return result
}
