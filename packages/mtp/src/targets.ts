/** @file Which token each position has to predict, and which positions carry no loss. */
import { type Backend, checkOptions, defaultIgnoreIndex, fromHost, MoeError, type Tensor } from '@moe/core'

/** Rows of consecutive tokens; `documents` numbers the document of every token, from 0. Padding has negative numbers, and carries no loss. */
export interface TokenRows {
  /** Row-major `[rows, length]`. */
  readonly tokens: Int32Array
  /** Row-major `[rows, length]`. */
  readonly documents: Int32Array
  /** For every token, the place in its row where the text begins that it belongs to: none before it is attended to. Default: 0, a row is one context. */
  readonly starts?: Int32Array
  /** For every token, what the main model's loss of predicting it is multiplied by, row-major `[rows, length]`. MTP modules have no use for it. Default: 1. */
  readonly weights?: Float32Array
  /** B, rows of the batch. */
  readonly rows: number
  /** Tokens of a row, those to be predicted included. */
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

/** @throws MoeError E_SHAPE */
function checkRows({ tokens, documents, rows, length }: TokenRows, time: number, shift: number): void {
  const refuse = (problem: string, fix: string) => new MoeError({ code: 'E_SHAPE', op: 'shiftTokens', problem, fix })
  if (!tokens || !documents) {
    throw refuse(`the rows have no ${tokens ? 'documents' : 'tokens'}`, 'pass { tokens, documents, rows, length }')
  }
  for (const [name, count] of Object.entries({ rows, length, time, shift })) {
    if (!Number.isInteger(count) || count < 0) throw refuse(`${name} = ${count} is no whole number from 0`, 'pass one')
  }
  if (tokens.length !== rows * length || documents.length !== rows * length) {
    const given = `${tokens.length} tokens and ${documents.length} documents`
    throw refuse(`${rows} rows of ${length} have ${given}`, 'pass one of both for every place of every row')
  }
  if (time + shift > length) {
    const problem = `rows of ${length} tokens cannot be shifted by ${shift} over ${time} positions`
    throw refuse(problem, 'pass longer rows: a prediction k places ahead needs k tokens more')
  }
}

/**
 * Shifts rows by `shift` places over the first `time` positions. A row needs `time + shift` tokens. A position whose target lies in another
 * document carries no loss: the last `shift` positions of every document. Nor do positions before `from` (default 0).
 * @throws MoeError E_SHAPE for rows that are shorter than that, or not as long as they say.
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

/** What the losses of all depths take of rows, on the host. Depth 0 is the main model, which predicts the next token. */
export interface DepthTargets {
  /** `[rows, length]`. */
  readonly tokens: Int32Array
  /** `[depths + 1, rows, time]`: the token that each depth has to predict, `ignoreIndex` where there is none. */
  readonly targets: Int32Array
  /** `[depths + 1]`: positions that carry loss. */
  readonly counts: readonly number[]
}

/** The same on a device: `uploadTargets`. Rows of other texts in their place give other losses by the same ops. */
export interface DepthTensors {
  /** `i32 [B, length]`. */
  readonly tokens: Tensor
  /** `i32 [depths + 1, B T]`. */
  readonly targets: Tensor
  /** `f32 [depths + 1]`: 1 / positions that carry loss; 1 where there are none. */
  readonly averages: Tensor
}

/** Targets of the main model and of `depths` modules, over the first `time` positions of every row; those before `from` (default 0) carry no loss. A row needs `time + depths + 1` tokens. */
export function depthTargets(
  rows: TokenRows,
  time: number,
  depths: number,
  options: { from?: number } = {},
): DepthTargets {
  checkOptions('depthTargets', options, { from: true })
  checkRows(rows, time, 1)
  const size = rows.rows * time
  const targets = new Int32Array((depths + 1) * size)
  const counts = Array.from({ length: depths + 1 }, (_, depth) => {
    const shifted = shiftTokens(rows, time, depth + 1, options)
    targets.set(shifted.targets, depth * size)
    return shifted.count
  })
  return { tokens: rows.tokens, targets, counts }
}

/** 1 / positions that carry loss, for every depth; 1 where there are none. @internal */
export function averagesOf({ counts }: DepthTargets): Float32Array<ArrayBuffer> {
  return Float32Array.from(counts, count => 1 / Math.max(1, count))
}

/** Uploads what `depthTargets` made of `rows` rows. */
export function uploadTargets(host: DepthTargets, rows: number, backend: Backend): DepthTensors {
  const { tokens, targets, counts } = host
  const depths = counts.length
  return {
    tokens: fromHost(tokens, [rows, tokens.length / rows], 'i32', backend),
    targets: fromHost(targets, [depths, targets.length / depths], 'i32', backend),
    averages: fromHost(averagesOf(host), [depths], 'f32', backend),
  }
}

/** Token ids `i32 [B, time]` that lie `shift` places ahead. @internal */
export const idsAhead = ({ tokens }: DepthTensors, time: number, shift: number): Tensor =>
  tokens.narrow(1, shift, shift + time)

/** Targets `i32 [B T]` of a depth, 0 for the main model. @internal */
export const targetsAt = ({ targets }: DepthTensors, depth: number): Tensor =>
  targets.narrow(0, depth, depth + 1).reshape([targets.shape[1]])

/** 1 / positions that carry loss at a depth, a scalar. @internal */
export const averageAt = ({ averages }: DepthTensors, depth: number): Tensor =>
  averages.narrow(0, depth, depth + 1).reshape([])
