/** @file Target tokens of each position, and the positions without a loss. */
import { type Backend, checkOptions, defaultIgnoreIndex, fromHost, MoeError, type Tensor } from '@moe/core'

/**
 * Rows of consecutive tokens. `documents` numbers the document of every token, from 0. Padding has negative numbers and
 * no loss.
 */
export interface TokenRows {
  /** Tokens, row-major `[rows, length]`. */
  readonly tokens: Int32Array
  /** Document numbers, row-major `[rows, length]`. */
  readonly documents: Int32Array
  /**
   * For each token, the position in its row at which its text begins; no earlier token is attended to. Default: 0, a
   * row is a single context.
   */
  readonly starts?: Int32Array
  /**
   * For each token, a factor on the main model's loss of predicting it, row-major `[rows, length]`. MTP modules ignore
   * it. Default: 1.
   */
  readonly weights?: Float32Array
  /** B, the number of rows. */
  readonly rows: number
  /** Number of tokens in a row, including those that are only targets. */
  readonly length: number
}

/** Input ids and targets of one depth. */
export interface ShiftedTokens {
  /** The token `shift` places ahead of each of the first `time` positions of every row, row-major `[rows, time]`. */
  readonly ids: Int32Array
  /** The same, but `ignoreIndex` if that token belongs to another document, or the position is below `from`. */
  readonly targets: Int32Array
  /** Number of positions with a loss. */
  readonly count: number
}

/** Checks that rows are long enough. @throws MoeError E_SHAPE */
function checkRows({ tokens, documents, rows, length }: TokenRows, time: number, shift: number): void {
  const shapeError = (problem: string, fix: string) =>
    new MoeError({ code: 'E_SHAPE', op: 'shiftTokens', problem, fix })
  if (!tokens || !documents) {
    throw shapeError(`the rows have no ${tokens ? 'documents' : 'tokens'}`, 'pass { tokens, documents, rows, length }')
  }
  for (const [name, count] of Object.entries({ rows, length, time, shift })) {
    if (!Number.isInteger(count) || count < 0)
      throw shapeError(`${name} = ${count} is invalid`, 'pass an integer of at least 0')
  }
  if (tokens.length !== rows * length || documents.length !== rows * length) {
    const given = `${tokens.length} tokens and ${documents.length} documents`
    throw shapeError(`${rows} rows of ${length} have ${given}`, `pass ${rows * length} of each`)
  }
  if (time + shift > length) {
    const problem = `rows of ${length} tokens cannot be shifted by ${shift} over ${time} positions`
    throw shapeError(problem, 'pass longer rows: a prediction k places ahead needs k additional tokens')
  }
}

/**
 * Shifts rows by `shift` places over the first `time` positions; a row needs `time + shift` tokens. A position has no
 * loss if its target belongs to another document, which applies to the last `shift` positions of every document, or if
 * it is before `from` (default 0).
 * @throws MoeError E_SHAPE if rows are too short, or their arrays do not have the stated length
 */
export function shiftTokens(
  rows: TokenRows,
  time: number,
  shift: number,
  options: { from?: number } = {},
): ShiftedTokens {
  checkOptions('shiftTokens', options, { from: true })
  const { from = 0 } = options
  const { tokens, documents, length } = rows
  checkRows(rows, time, shift)
  const ids = new Int32Array(rows.rows * time)
  const targets = new Int32Array(rows.rows * time)
  let count = 0
  for (let row = 0; row < rows.rows; row++) {
    for (let t = 0; t < time; t++) {
      const here = row * length + t
      const at = row * time + t
      ids[at] = tokens[here + shift]
      const counts = t >= from && documents[here] >= 0 && documents[here] === documents[here + shift]
      targets[at] = counts ? ids[at] : defaultIgnoreIndex
      if (counts) count++
    }
  }
  return { ids, targets, count }
}

/** Targets of all depths on the host. Depth 0 is the main model, which predicts the next token. */
export interface DepthTargets {
  /** `[rows, length]`. */
  readonly tokens: Int32Array
  /** `[depths + 1, rows, time]`: the target of each depth, or `ignoreIndex`. */
  readonly targets: Int32Array
  /** `[depths + 1]`: number of positions with a loss. */
  readonly counts: readonly number[]
}

/**
 * Targets of all depths on a device, created by `uploadTargets`. Overwriting them with those of other rows changes the
 * losses but not the ops, so the losses can be captured in a graph.
 */
export interface DepthTensors {
  /** `i32 [B, length]`. */
  readonly tokens: Tensor
  /** `i32 [depths + 1, B T]`. */
  readonly targets: Tensor
  /** `f32 [depths + 1]`: 1 / number of positions with a loss, or 1 if there are none. */
  readonly inverseCounts: Tensor
}

/**
 * Returns the targets of the main model and of `depths` modules over the first `time` positions of every row. Positions
 * before `from` (default 0) have no loss. A row needs `time + depths + 1` tokens.
 * @throws MoeError E_SHAPE
 */
export function depthTargets(
  rows: TokenRows,
  time: number,
  depths: number,
  options: { from?: number } = {},
): DepthTargets {
  checkOptions('depthTargets', options, { from: true })
  const shifted = Array.from({ length: depths + 1 }, (_, depth) => shiftTokens(rows, time, depth + 1, options))
  const targets = new Int32Array(shifted.length * rows.rows * time)
  for (const [depth, one] of shifted.entries()) targets.set(one.targets, depth * rows.rows * time)
  return { tokens: rows.tokens, targets, counts: shifted.map(({ count }) => count) }
}

/** 1 / number of positions with a loss for each depth, or 1 if there are none. @internal */
export function inverseCountsOf({ counts }: DepthTargets): Float32Array<ArrayBuffer> {
  return Float32Array.from(counts, count => 1 / Math.max(1, count))
}

/** Uploads the result of `depthTargets` for `rows` rows. */
export function uploadTargets(host: DepthTargets, rows: number, backend: Backend): DepthTensors {
  const { tokens, targets, counts } = host
  const depths = counts.length
  return {
    tokens: fromHost(tokens, [rows, tokens.length / rows], 'i32', backend),
    targets: fromHost(targets, [depths, targets.length / depths], 'i32', backend),
    inverseCounts: fromHost(inverseCountsOf(host), [depths], 'f32', backend),
  }
}

/** Token ids `i32 [B, time]`, `shift` places ahead. @internal */
export const idsAhead = ({ tokens }: DepthTensors, time: number, shift: number): Tensor =>
  tokens.narrow(1, shift, shift + time)

/** Targets `i32 [B T]` of a depth; 0 is the main model. @internal */
export const targetsAt = ({ targets }: DepthTensors, depth: number): Tensor =>
  targets.narrow(0, depth, depth + 1).reshape([targets.shape[1]])

/** 1 / number of positions with a loss at a depth, a scalar. @internal */
export const inverseCountAt = ({ inverseCounts }: DepthTensors, depth: number): Tensor =>
  inverseCounts.narrow(0, depth, depth + 1).reshape([])
