/** @file Routing in expert parallelism: an all-to-all sends tokens to the ranks of their experts, another one returns the results. */
import {
  checkOptions,
  combineTokens,
  type DispatchPlan,
  dispatchPlan,
  fromHost,
  MoeError,
  ones,
  permuteTokens,
  type Tensor,
} from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import type { PiecewisePass } from './piecewise-pass.ts'

/** The experts of this rank, such as `Experts` of `@moe/router`. */
export interface ExpertsShard {
  /** Applies the experts in the plan to tokens `[N, D]` and returns the sum of their outputs weighted by `[N, K]`: `[N, D]`. */
  route(x: Tensor, weights: Tensor, plan: DispatchPlan): Tensor
}

/** A rank's tokens, and the experts chosen for them. */
export interface RoutedTokens {
  /** Tokens `[N, D]`, a leaf of the pass. N is at least 1 and may differ between ranks. */
  readonly x: Tensor
  /** Gating weights `[N, K]`, a leaf of the pass. */
  readonly weights: Tensor
  /** Chosen experts `i32 [N, K]`, numbered over all ranks. */
  readonly indices: Tensor
}

/**
 * Applies routed experts that are sharded over R ranks: rank r holds the experts from r E/R to (r + 1) E/R, exclusive. Each token is sent to the rank of each
 * of its K experts, and the results are returned and combined with the gating weights. Routing is dropless: a rank receives all rows that chose its experts, possibly
 * none. With one rank for each expert group, group-limited routing bounds the number of ranks that a token is sent to.
 *
 * The row counts are read back to the host, to size the messages.
 * @param shard this rank's experts
 * @param experts E, the number of experts over all ranks
 * @param options.back a separate group of the same ranks for messages of the backward pass; needed if passes overlap. Default: `ranks`
 * @returns `[N, D]`, a leaf of the pass
 * @throws MoeError E_CONFIG if the ranks do not divide the experts
 */
export async function routeOverRanks(
  pass: PiecewisePass,
  ranks: Communicator,
  shard: ExpertsShard,
  tokens: RoutedTokens,
  experts: number,
  options: { readonly back?: Communicator } = {},
): Promise<Tensor> {
  checkOptions('routeOverRanks', options, { back: true })
  const own = experts / ranks.size
  if (!Number.isInteger(own)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'routeOverRanks',
      problem: `${experts} experts cannot be divided among ${ranks.size} ranks`,
      fix: `use a number of ranks that divides ${experts}`,
    })
  }
  const exchange = (counts: Int32Array<ArrayBuffer>) => exchangeCounts(ranks, counts, own, tokens.x)
  return route(pass, ranks, shard, tokens, experts, { ...options, exchange })
}

/** `routeOverRanks` with any exchange of row counts: from those of this rank's rows by expert to those that each rank sends to this one. */
export async function route(
  pass: PiecewisePass,
  ranks: Communicator,
  shard: ExpertsShard,
  { x, weights, indices }: RoutedTokens,
  experts: number,
  {
    back,
    exchange,
  }: {
    readonly back?: Communicator
    readonly exchange: (counts: Int32Array<ArrayBuffer>) => Promise<readonly Int32Array[]>
  },
): Promise<Tensor> {
  const plan = pass.run(() => dispatchPlan(indices, experts))
  const counts = Int32Array.from(await plan.counts.values())
  const [sorted] = pass.piece([x], tokens => [permuteTokens(tokens, plan)])
  const incoming = await exchange(counts)
  const own = experts / ranks.size
  // Rows sorted by expert are also sorted by rank.
  const sent = Array.from({ length: ranks.size }, (_, r) => sum(counts.subarray(r * own, (r + 1) * own)))
  const returned = await computeRows(pass, ranks, shard, sorted, { sent, incoming, own, back })
  const [combined] = pass.piece([returned, weights], (rows, gates) => [combineTokens(rows, gates, plan)])
  pass.release(returned, plan.order, plan.positions, plan.offsets, plan.counts)
  return combined
}

/** Which rows go where, and come from where. */
interface RowPlan {
  /** Number of rows that this rank sends to each rank. */
  readonly sent: readonly number[]
  /** Number of rows that each rank sends to each of this rank's experts. */
  readonly incoming: readonly Int32Array[]
  /** Number of this rank's experts. */
  readonly own: number
  readonly back?: Communicator | undefined
}

/**
 * Sends rows `[n, D]`, sorted by rank, to the ranks of their experts, applies this rank's experts to the rows that it receives, and returns the results: a leaf
 * `[n, D]`. All ranks call it.
 */
export async function computeRows(
  pass: PiecewisePass,
  ranks: Communicator,
  shard: ExpertsShard,
  rows: Tensor,
  { sent, incoming, own, back = ranks }: RowPlan,
): Promise<Tensor> {
  const { backend } = rows
  const received = incoming.map(sum)
  const allToAll = (by: Communicator, to: readonly number[], from: readonly number[]) => async (rows: Tensor) =>
    (await by.allToAll(rows, to, from)).rows

  const arrived = await pass.exchange(rows, allToAll(ranks, sent, received), allToAll(back, received, sent))
  pass.discard(rows)
  const chosen = expertsOf(incoming)
  const computed =
    chosen.length === 0
      ? arrived
      : pass.piece([arrived], rows => {
          const local = dispatchPlan(fromHost(chosen, [chosen.length, 1], 'i32', backend), own)
          return [shard.route(rows, ones([chosen.length, 1], { backend }), local)]
        })[0]
  const returned = await pass.exchange(computed, allToAll(ranks, received, sent), allToAll(back, sent, received))
  pass.release(arrived)
  pass.discard(computed)
  return returned
}

/** Returns, for each rank, the number of rows that it sends to each of this rank's experts. */
async function exchangeCounts(
  ranks: Communicator,
  counts: Int32Array<ArrayBuffer>,
  own: number,
  { backend }: Tensor,
): Promise<Int32Array[]> {
  const rows = fromHost(counts, [counts.length, 1], 'i32', backend)
  const each = new Array(ranks.size).fill(own)
  const { rows: received } = await ranks.allToAll(rows, each, each)
  const values = Int32Array.from(await received.values())
  rows.dispose()
  received.dispose()
  return Array.from({ length: ranks.size }, (_, r) => values.slice(r * own, (r + 1) * own))
}

/** The expert of every received row: the rows from each rank are in the order of experts. */
function expertsOf(incoming: readonly Int32Array[]): Int32Array<ArrayBuffer> {
  const experts = new Int32Array(incoming.reduce((total, counts) => total + sum(counts), 0))
  let at = 0
  for (const counts of incoming)
    for (const [expert, count] of counts.entries()) {
      experts.fill(expert, at, at + count)
      at += count
    }
  return experts
}

function sum(numbers: Int32Array): number {
  return numbers.reduce((total, n) => total + n, 0)
}
