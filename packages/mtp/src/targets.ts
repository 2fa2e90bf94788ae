/** @file Which token each position has to predict, and which positions carry no loss. */
import { defaultIgnoreIndex } from '@moe/core'

/** Rows of consecutive tokens; `documents` numbers the document of every token. */
export interface TokenRows {
  readonly tokens: Int32Array
  readonly documents: Int32Array
  readonly rows: number
  readonly length: number
}

/** Targets of one depth. */
export interface ShiftedTokens {
  /** Token `shift` places ahead of each of the first `time` positions of every row, row-major `[rows, time]`. */
  readonly ids: Int32Array
  /** The same with `ignoreIndex` where that token belongs to another document, or the position is below `from`. */
  readonly targets: Int32Array
  /** Positions that carry loss. */
  readonly count: number
}

/**
 * Shifts rows by `shift` places over the first `time` positions. A row needs `time + shift` tokens. A position whose target lies in another
 * document carries no loss: the last `shift` positions of every document.
 */
export function shiftTokens(
  rows: TokenRows,
  time: number,
  shift: number,
  options: { from?: number } = {},
): ShiftedTokens {
  const { from = 0 } = options
  const { tokens, documents, length } = rows
  if (time + shift > length)
    throw new RangeError(`rows of ${length} tokens cannot be shifted by ${shift} over ${time} positions`)
  const ids = new Int32Array(rows.rows * time)
  const targets = new Int32Array(rows.rows * time)
  let count = 0
  for (let row = 0; row < rows.rows; row++) {
    for (let t = 0; t < time; t++) {
      const here = row * length + t
      const at = row * time + t
      ids[at] = tokens[here + shift]
      const counts = t >= from && documents[here] === documents[here + shift]
      targets[at] = counts ? ids[at] : defaultIgnoreIndex
      if (counts) count++
    }
  }
  return { ids, targets, count }
}
