/** @file Several processes that train one model together: what the trainer asks of them, and what a step does with it. */
import { concat, MoeError, type SharingRanks, scope, type Tensor, tensor } from '@moe/core'
import type { TokenBatch } from './model.ts'
import { type Pass, weightOf } from './step-numbers.ts'

/**
 * One of the ranks of a training. All make the same calls in the same order. A `Communicator` of `@moe/parallel` is one.
 */
export interface Ranks {
  /** Number of this rank, from 0. */
  readonly rank: number
  /** Number of ranks. */
  readonly size: number
  /** Sums over all ranks, the same bits on each. Resolves to new tensors, which belong to the caller. */
  allReduce(tensors: readonly Tensor[]): Promise<Tensor[]>
  /**
   * The same, with the sums in the place of what was given, at the same addresses: recorded steps read them there. Goes together with `allReduce` of other ranks. Without it steps go op
   * by op.
   */
  allReduceInPlace?(tensors: readonly Tensor[]): Promise<void>
  /** `[n]` of every rank, one behind the other: `[size n]`, which belongs to the caller. */
  allGather(tensor: Tensor): Promise<Tensor>
  /**
   * As `SharingRanks`. With this, `gatherShares`, `send` and `receive` the optimizer is shared out: each rank keeps the state of its share of the parameters, and updates it for all. Without them every rank keeps all of the state, and takes
   * the whole update.
   */
  reduceShares?: SharingRanks['reduceShares']
  /** As `SharingRanks`. */
  gatherShares?: SharingRanks['gatherShares']
  /** To one rank, which receives in the order of sending. */
  send?(tensor: Tensor, to: number): Promise<void>
  /** What rank `from` sends next, which must be of this shape and dtype; it belongs to the caller. */
  receive?(like: Pick<Tensor, 'shape' | 'dtype' | 'backend'>, from: number): Promise<Tensor>
}

/** Ranks that send each other tensors. */
export type SendingRanks = Ranks & Required<Pick<Ranks, 'send' | 'receive'>>

/** Ranks that an optimizer can be shared out to. */
export type OptimizerRanks = SendingRanks & SharingRanks

export const canShare = (ranks: Ranks): ranks is OptimizerRanks =>
  [ranks.reduceShares, ranks.gatherShares, ranks.send, ranks.receive].every(member => typeof member === 'function')

/** Ranks whose steps can be recorded. */
export type RecordableRanks = Ranks & Required<Pick<Ranks, 'allReduceInPlace'>>

/** A micro-batch of any rank, and what its gradient was multiplied by. */
export interface WeightedPass extends Pass {
  readonly weight: number
}

/**
 * The micro-batches of all ranks, in the order of ranks. All ranks have as many of them, with the same metrics.
 * @param own `values` of each as a vector on the device
 */
export async function gatherPasses(
  ranks: Ranks,
  own: ReadonlyArray<
    Omit<Pass, 'values'> & { readonly values: Tensor; readonly batch: Pick<TokenBatch, 'rows' | 'length'> }
  >,
): Promise<WeightedPass[]> {
  const [{ metrics, values }] = own
  const rows = scope(() =>
    concat(own.flatMap(({ count, batch, values }) => [tensor([count, batch.rows, batch.length], [3], values), values])),
  )
  const numbers = await gathered(ranks, rows)
  const width = 3 + values.size
  const passes = numbers.length / width
  return Array.from({ length: passes }, (_, i) => {
    const [count, rows, length, ...rest] = numbers.subarray(i * width, (i + 1) * width)
    return { count, metrics, values: rest, weight: weightOf(count, { rows, length }, passes > 1) }
  })
}

/** Numbers of every rank, `[size][numbers.length]`, rounded to f32. */
export async function gatherNumbers(
  ranks: Ranks,
  numbers: readonly number[],
  like: Pick<Tensor, 'backend'>,
): Promise<number[][]> {
  const all = await gathered(ranks, tensor(numbers, [numbers.length], { backend: like.backend }))
  return Array.from({ length: ranks.size }, (_, r) => [...all.subarray(r * numbers.length, (r + 1) * numbers.length)])
}

/** The norm of a whole, rounded to f32, of which every rank has a part. @param parts of this rank's, as `globalNormParts` gives them */
export async function normOverRanks(ranks: Ranks, parts: Tensor): Promise<number> {
  using all = await ranks.allGather(parts)
  const values = await all.values()
  let squares = 0
  for (let at = 0; at < values.length; at += 3) squares += (values[at] + values[at + 1] + values[at + 2]) ** 2
  return Math.fround(Math.sqrt(squares))
}

/** A value of every rank that JSON can hold. */
export async function gatherValues<T>(ranks: Ranks, value: T, { backend }: Pick<Tensor, 'backend'>): Promise<T[]> {
  const text = new TextEncoder().encode(JSON.stringify(value))
  const lengths = await gathered(ranks, tensor(Int32Array.of(text.length), [1], { backend }))
  const width = Math.max(...lengths)
  const padded = new Uint8Array(width)
  padded.set(text)
  const all = Uint8Array.from(await gathered(ranks, tensor(padded, [width], { backend })))
  return Array.from(lengths, (length, rank) =>
    JSON.parse(new TextDecoder().decode(all.subarray(rank * width, rank * width + length))),
  )
}

/** What all ranks have to agree on before the first step. */
export interface Start {
  readonly step: number
  /** What they wait for each other for. */
  readonly plan: Readonly<Record<string, number | boolean | string>>
  /** Norms of the weights that other ranks may have as well, by name. */
  readonly norms: Readonly<Record<string, number>>
}

/** @throws MoeError E_CONFIG unless all ranks begin at the same step with the same plan, and with the same weights where they have the same parameters */
export function checkSameStart(starts: readonly Start[]): void {
  for (const [rank, { step, plan, norms }] of starts.entries()) {
    const planned = Object.keys(plan).find(name => plan[name] !== starts[0].plan[name])
    if (planned !== undefined) {
      const [first, other] = [starts[0].plan[planned], plan[planned]]
      const problem = `rank 0 has ${planned} ${first}, rank ${rank} ${other}`
      throw differing(problem, 'give train the same options on every rank')
    }
    for (const [before, other] of starts.slice(0, rank).entries()) {
      const unlike = Object.keys(norms).find(name => name in other.norms && other.norms[name] !== norms[name])
      if (step === other.step && unlike === undefined) continue
      const show = ({ step, norms }: Start) =>
        `step ${step}${unlike === undefined ? '' : ` with weights of norm ${norms[unlike]} in ${unlike}`}`
      throw differing(
        `rank ${before} begins at ${show(other)}, rank ${rank} at ${show(starts[rank])}`,
        'make the same model on every rank (the same seed), and let all see the same folder when they resume',
      )
    }
  }
}

const differing = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'train', problem, fix })

/** The elements of all ranks. The tensor is freed. */
async function gathered(ranks: Ranks, own: Tensor): ReturnType<Tensor['values']> {
  using all = await ranks.allGather(own).finally(() => own.dispose())
  return await all.values()
}
