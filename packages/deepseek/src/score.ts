/** @file Log-probabilities of given texts. */
import type { PagedCache, PagedSequence, SequenceCache } from '@moe/attention-mla'
import {
  checkOptions,
  checkPrecision,
  MoeError,
  type OptionNames,
  type Precision,
  type Tensor,
  yieldToEventLoop,
} from '@moe/core'
import { checkIds } from './check-ids.ts'
import { defaultPrecision } from './default-precision.ts'
import { hiddenStates } from './hidden-states.ts'
import { checkTop, logProbsAt, type TokenLogProb } from './log-probs.ts'
import type { Network } from './network.ts'
import { chunks, distinctRows, type Row, sharedPrefixes } from './shared-prefixes.ts'

/** Options of `DeepSeek.score`. */
export interface ScoreOptions {
  /** Number of most likely tokens to return with each token. Default 0. */
  readonly top?: number | undefined
  /** For each text, the position of its first scored token; earlier ones are null. Common prefixes before it are processed once. Default 1: all tokens. */
  readonly from?: readonly number[] | undefined
  /** Precision of matrix products. Default: bf16 for quantized weights (bf16 included), else f32. */
  readonly precision?: Precision | undefined
  /** Aborts between two passes: the promise rejects with E_ABORTED, with the signal's reason as its cause. */
  readonly signal?: AbortSignal | undefined
  /** Called after each pass with the share of processed tokens, from 0 to 1. */
  readonly onProgress?: ((done: number) => void) | undefined
}

const names: OptionNames<ScoreOptions> = { top: true, from: true, precision: true, signal: true, onProgress: true }

/** Maximum tokens of a pass over several texts, and maximum tokens that they attend to. Tests reduce them. */
export const limits = { passTokens: 4096, passKeys: 16384 }

type Scores = Array<Array<TokenLogProb | null>>

/** Internal: see `DeepSeek.score`. */
export async function score(
  model: Network,
  texts: ReadonlyArray<ArrayLike<number>>,
  options: ScoreOptions,
): Promise<Scores> {
  checkOptions('score', options, names)
  const { top = 0, precision = defaultPrecision(model), from, signal, onProgress } = options
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
          report: (scored: TokenLogProb) => {
            result[number][first + i] = scored
          },
        }))
      }),
    top,
    turn: async done => {
      onProgress?.(done)
      await yieldToEventLoop()
      if (!signal?.aborted) return
      throw new MoeError({ code: 'E_ABORTED', op: 'score', problem: 'scoring was aborted', cause: signal.reason })
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
  model: Network,
  texts: ReadonlyArray<ArrayLike<number>>,
  from: readonly number[] | undefined,
): void {
  const refused = (problem: string, fix: string) => new MoeError({ code: 'E_ATTR', op: 'score', problem, fix })
  if (!Array.isArray(texts as unknown)) throw refused('expected a list of texts', 'pass [ids, ...]')
  const { max_position_embeddings: context } = model.config
  for (const [i, text] of texts.entries()) {
    checkIds('score', model.config, text)
    // The last token is only scored, not processed.
    if (text.length <= context + 1) continue
    const problem = `text ${i} has ${text.length} tokens, more than the model's context of ${context} plus one`
    throw refused(problem, 'split it: evaluateTask(model, tasks.text, ...) of @moe/evaluation does this')
  }
  if (from === undefined) return
  const isNumber = (first: number) => Number.isInteger(first) && first >= 0
  if (Array.isArray(from as unknown) && from.length === texts.length && from.every(isNumber)) return
  const given = Array.isArray(from as unknown) ? `[${from.slice(0, 8)}]` : `${from}`
  throw refused(`from = ${given}, expected one position for each of ${texts.length} texts`, 'pass an array of integers')
}

/** A requested log-probability. */
interface Wanted {
  /** Index of the hidden state before the token, among those computed for the row. */
  readonly state: number
  /** The token to score. */
  readonly token: number
  readonly report: (scored: TokenLogProb) => void
}

interface Asked {
  readonly top: number
  /** The requests of a row whose tokens are processed from `start` on. */
  readonly wanted: (row: Row, start: number) => readonly Wanted[]
  /** Called between two passes. */
  readonly turn: (done: number) => Promise<void>
}

/** A row of which the tokens from `start` on are to be processed. */
interface Reading {
  readonly row: Row
  readonly start: number
  readonly sequence: PagedSequence | null
}

const restOf = ({ row, start }: Reading): number => row.tokens.length - start

/** Processes rows. Rows without common prefixes run without a cache; the others share the cache pages of their prefixes, which are processed first. */
class ScorePasses {
  readonly #model: Network
  readonly #precision: Precision
  readonly #asked: Asked
  #cache: PagedCache | null = null
  #total = 0
  #read = 0

  constructor(model: Network, precision: Precision, asked: Asked) {
    this.#model = model
    this.#precision = precision
    this.#asked = asked
  }

  /** Processes rows, which must be distinct and sorted. */
  async run(rows: readonly Row[]): Promise<void> {
    this.#total = rows.reduce((sum, { tokens }) => sum + tokens.length, 0)
    const prefixes = sharedPrefixes(rows)
    const longest = rows.reduce((most, { tokens }) => Math.max(most, tokens.length), 0)
    const alone = rows.filter((_, i) => prefixes[i] === 0)
    const together = rows.filter((_, i) => prefixes[i] > 0)
    if (together.length > 0) {
      // Room for the common prefixes of a chunk, padded to at most double size, and one pass. With pages of one token, prefixes are shared to their last token.
      this.#cache = this.#model.makePagedCache({ tokens: 5 * limits.passTokens + 3 * longest, pageSize: 1 })
    }
    for (const chunk of chunks(together, 2 * limits.passTokens)) await this.#runChunk(chunk)
    await this.#pass(alone.map(row => ({ row, start: 0, sequence: null })))
  }

  /** Processes rows that have common prefixes. The prefixes stay in the cache until all rows are processed. */
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
          // Prefixes are not scored, so that they may be found in the cache completely.
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

  /** Processes rows in one pass, or one long row in several. */
  async #passTogether(group: readonly Reading[]): Promise<void> {
    if (restOf(group[0]) > limits.passTokens) await this.#passInPieces(group[0])
    else await this.#onePass(group, this.#batchOf(group, restOf(group[0])), restOf(group[0]))
    for (const { row, sequence } of group) {
      if (sequence === null) continue
      if (row.texts.length === 0) this.#cache?.share(sequence, row.tokens)
      else this.#cache?.release(sequence)
    }
  }

  /** Processes a row that is too long for one pass. Without common prefixes, it has a cache of its own. */
  async #passInPieces(reading: Reading): Promise<void> {
    const { row, sequence } = reading
    const { length } = row.tokens
    const own = sequence === null ? this.#model.makeCache({ capacity: length }) : null
    try {
      for (let { start } = reading; start < length; start += limits.passTokens) {
        const piece = [{ row, start, sequence }]
        const time = Math.min(limits.passTokens, length - start)
        await this.#onePass(piece, own ?? this.#batchOf(piece, time), time)
        const read = row.texts.length > 0 ? start + time : 0
        if (start + time < length) await this.#asked.turn((this.#read + read) / this.#total)
      }
    } finally {
      own?.dispose()
    }
  }

  /** Processes the next `time` tokens of rows. Shorter ones are padded at their ends, where padding is not attended to. */
  async #onePass(group: readonly Reading[], cache: SequenceCache | undefined, time: number): Promise<void> {
    const ids = Int32Array.from({ length: group.length * time }, (_, i) => {
      const { row, start } = group[Math.floor(i / time)]
      return row.tokens[start + (i % time)] ?? 0
    })
    const model = this.#model
    const hidden = await hiddenStates(model, { depth: 0, ids, batch: group.length, cache }, this.#precision)
    try {
      await this.#report(hidden, group)
    } finally {
      hidden.dispose()
    }
  }

  #batchOf(group: readonly Reading[], time: number): SequenceCache | undefined {
    const cache = this.#cache
    if (cache === null || group[0].sequence === null) return undefined
    for (const { start, sequence } of group) {
      if (cache.reserve(sequence as PagedSequence, start + time)) continue
      const problem = `not enough memory for ${start + time} tokens of a text and ${group.length - 1} other texts`
      throw new MoeError({ code: 'E_OUT_OF_MEMORY', op: 'score', problem })
    }
    return cache.batch(group.map(({ sequence }) => sequence as PagedSequence))
  }

  async #report(hidden: Tensor, group: readonly Reading[]): Promise<void> {
    const time = hidden.shape[1]
    const all = group.flatMap(({ row, start }, b) => {
      const own = this.#asked.wanted(row, start).filter(({ state }) => state >= 0 && state < time)
      return own.map(one => ({ ...one, state: b * time + one.state }))
    })
    const states = all.map(({ state }) => state)
    const tokens = all.map(({ token }) => token)
    const how = { states, top: this.#asked.top, precision: this.#precision }
    const scored = await logProbsAt(this.#model, hidden, tokens, how)
    for (const [i, { report }] of all.entries()) report(scored[i])
  }

  dispose(): void {
    this.#cache?.dispose()
  }
}

/** Groups rows into passes, in decreasing length. Cached rows of a pass have at least half the length of the longest. */
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
