/** @file Experts of one layer on several ranks: tokens travel to their experts and back. */
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

/** The experts of this rank; `Experts` of `@moe/router` are some. */
export interface ExpertsShare {
  /** What the experts that the plan chose make of tokens `[N, D]`, weighted by `[N, K]` and summed: `[N, D]`. */
  route(x: Tensor, weights: Tensor, plan: DispatchPlan): Tensor
}

/** Tokens of a rank, and where they go. */
export interface RoutedTokens {
  /** `[N, D]`, a leaf of the pass. Every rank has tokens of its own, of any number from 1. */
  readonly x: Tensor
  /** Gates `[N, K]`, a leaf of the pass. */
  readonly weights: Tensor
  /** Chosen experts `i32 [N, K]`, of all ranks. */
  readonly indices: Tensor
}

/**
 * Routed experts that lie on several ranks, rank r having experts r E/R to (r+1) E/R - 1: every choice of a token travels to the rank of its expert, is computed there, and travels back, where the
 * gates weigh it. No token is dropped; a rank gets as many rows as chose its experts, and none is fine. Group-limited routing bounds to how many ranks a token travels.
 *
 * The counts are read by the host, which sizes the messages.
 * @param experts E, of all ranks together
 * @param options.back the same ranks in a group of their own, for what travels in the backward pass: where passes are under way at once. Default: `ranks`.
 * @returns `[N, D]`, a leaf of the pass
 * @throws MoeError E_CONFIG when the ranks do not divide the experts
 */
export async function routeOverRanks(
  pass: PiecewisePass,
  ranks: Communicator,
  share: ExpertsShare,
  { x, weights, indices }: RoutedTokens,
  experts: number,
  options: { readonly back?: Communicator } = {},
): Promise<Tensor> {
  checkOptions('routeOverRanks', options, { back: true })
  const { back = ranks } = options
  const own = experts / ranks.size
  if (!Number.isInteger(own)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'routeOverRanks',
      problem: `${experts} experts cannot be shared by ${ranks.size} ranks`,
      fix: 'use a number of ranks that divides them',
    })
  }
  const { backend } = x
  const plan = pass.run(() => dispatchPlan(indices, experts))
  const counts = Int32Array.from(await plan.counts.values())
  // Sorted by expert is sorted by rank.
  const sent = Array.from({ length: ranks.size }, (_, r) => sum(counts.subarray(r * own, (r + 1) * own)))
  const coming = await exchangeCounts(ranks, counts, own, x)
  const received = coming.map(sum)
  const travel = (by: Communicator, to: readonly number[], from: readonly number[]) => async (rows: Tensor) =>
    (await by.allToAll(rows, to, from)).rows

  const [sorted] = pass.piece([x], tokens => [permuteTokens(tokens, plan)])
  const arrived = await pass.exchange(sorted, travel(ranks, sent, received), travel(back, received, sent))
  const chosen = expertsOf(coming)
  const computed =
    chosen.length === 0
      ? arrived
      : pass.piece([arrived], rows => {
          const local = dispatchPlan(fromHost(chosen, [chosen.length, 1], 'i32', backend), own)
          return [share.route(rows, ones([chosen.length, 1], { backend }), local)]
        })[0]
  const returned = await pass.exchange(computed, travel(ranks, received, sent), travel(back, sent, received))
  return pass.piece([returned, weights], (rows, gates) => [combineTokens(rows, gates, plan)])[0]
}

/** For each rank, how many rows of each of this rank's experts it sends. */
async function exchangeCounts(
  ranks: Communicator,
  counts: Int32Array<ArrayBuffer>,
  own: number,
  { backend }: Tensor,
): Promise<Int32Array[]> {
  const rows = fromHost(counts, [counts.length, 1], 'i32', backend)
  const each = new Array(ranks.size).fill(own)
  const { rows: came } = await ranks.allToAll(rows, each, each)
  const values = Int32Array.from(await came.values())
  rows.dispose()
  came.dispose()
  return Array.from({ length: ranks.size }, (_, r) => values.slice(r * own, (r + 1) * own))
}

/** The expert of every row that arrived: the rows of each rank are in the order of experts. */
function expertsOf(coming: readonly Int32Array[]): Int32Array<ArrayBuffer> {
  const experts = new Int32Array(coming.reduce((total, of) => total + sum(of), 0))
  let at = 0
  for (const of of coming)
    for (const [expert, count] of of.entries()) {
      experts.fill(expert, at, at + count)
      at += count
    }
  return experts
}

function sum(numbers: Int32Array): number {
  return numbers.reduce((total, n) => total + n, 0)
}
