/** @file Log-probabilities of texts that are there. */
import {
  checkOptions,
  checkPrecision,
  eventLoopTurn,
  fromHost,
  keep,
  MoeError,
  type OptionNames,
  type Precision,
} from '@moe/core'
import { checkIds } from './generate.ts'
import { checkTop, logProbsBehind, type TokenLogProb } from './log-probs.ts'
import type { DeepSeek } from './model.ts'
import { usualPrecision } from './usual-precision.ts'

/** What `score` tells, and how it computes. */
export interface ScoreOptions {
  /** How many of the likeliest tokens to tell beside each. Default 0. */
  readonly top?: number
  /** Of matrix products. Default: bf16 where weights are stored in bf16 or fewer bits, else f32. */
  readonly precision?: Precision
}

const names: OptionNames<ScoreOptions> = { top: true, precision: true }

/** Most tokens of a pass over several texts. Tests make it small. */
export const limits = { passTokens: 4096 }

/** Internal: see `DeepSeek.score`. */
export async function score(
  model: DeepSeek,
  texts: ReadonlyArray<ArrayLike<number>>,
  options: ScoreOptions,
): Promise<Array<Array<TokenLogProb | null>>> {
  checkOptions('score', options, names)
  const { top = 0, precision = usualPrecision(model) } = options
  checkTop('score', 'top', top)
  checkPrecision('score', precision)
  if (!Array.isArray(texts as unknown)) {
    throw new MoeError({ code: 'E_ATTR', op: 'score', problem: 'no list of texts is given', fix: 'pass [ids, ...]' })
  }
  for (const text of texts) checkIds('score', model, text)
  const result: Array<Array<TokenLogProb | null>> = texts.map(() => [null])
  for (const rows of passes(texts)) {
    // The first of them is the longest. What fills the others up stands behind them, where they do not see it.
    const time = texts[rows[0]].length - 1
    const ids = Int32Array.from(
      { length: rows.length * time },
      (_, i) => texts[rows[Math.floor(i / time)]][i % time] ?? 0,
    )
    const hidden = keep(
      model.infer(() => model.hidden(fromHost(ids, [rows.length, time], 'i32', model.backend)), { precision }),
    )
    try {
      for (const [b, row] of rows.entries()) {
        const behind = Array.from(texts[row]).slice(1)
        result[row].push(...(await logProbsBehind(model, hidden, behind, { from: b * time, top, precision })))
      }
    } finally {
      hidden.dispose()
    }
    await eventLoopTurn()
  }
  return result
}

/** Texts, by number, that go through together, the longest of them first. */
function passes(texts: ReadonlyArray<ArrayLike<number>>): number[][] {
  const order = Array.from(texts.keys()).filter(row => texts[row].length > 1)
  order.sort((a, b) => texts[b].length - texts[a].length)
  const result: number[][] = []
  for (const row of order) {
    const last = result[result.length - 1]
    const fits = last !== undefined && (last.length + 1) * texts[last[0]].length <= limits.passTokens
    if (fits) last.push(row)
    else result.push([row])
  }
  return result
}
