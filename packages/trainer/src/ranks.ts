/** @file Communication between processes that train one model together. */
import { concat, type ShardCommunicator, scope, type Tensor, tensor } from '@moe/core'
import type { TokenBatch } from './model.ts'
import { type Pass, weightOf } from './step-numbers.ts'

/**
 * One rank of a training, with its collectives. All ranks must make the same calls in the same order. A `Communicator`
 * of `@moe/parallel` implements it.
 */
export interface Ranks {
  /** Index of this rank, from 0. */
  readonly rank: number
  /** Number of ranks. */
  readonly size: number
  /** Sums tensors over all ranks, with the same bits on each. Resolves to new tensors, which belong to the caller. */
  allReduce(tensors: readonly Tensor[]): Promise<Tensor[]>
  /**
   * Like `allReduce`, but stores the sums in the given tensors, at the same addresses, where recorded steps read them.
   * Other ranks may call `allReduce` in the same round. Without this method, steps run op by op.
   */
  allReduceInPlace?(tensors: readonly Tensor[]): Promise<void>
  /** Concatenates `[n]` of every rank to `[size n]`, which belongs to the caller. */
  allGather(tensor: Tensor): Promise<Tensor>
  /**
   * As in `ShardCommunicator`. With this, `allGatherRows`, `send` and `receive`, the optimizer is sharded: each rank keeps
   * the state of its share of the parameters and updates it for all. Otherwise every rank keeps all of the state.
   */
  reduceScatterRows?: ShardCommunicator['reduceScatterRows']
  /** As in `ShardCommunicator`. */
  allGatherRows?: ShardCommunicator['allGatherRows']
  /** Sends a tensor to one rank, which receives messages in the order of sending. */
  send?(tensor: Tensor, to: number): Promise<void>
  /** Receives the next tensor from rank `from`, which must have this shape and dtype. It belongs to the caller. */
  receive?(like: Pick<Tensor, 'shape' | 'dtype' | 'backend'>, from: number): Promise<Tensor>
}

/** Ranks with point-to-point messages. */
export type SendingRanks = Ranks & Required<Pick<Ranks, 'send' | 'receive'>>

/** Ranks that can shard an optimizer. */
export type OptimizerRanks = SendingRanks & ShardCommunicator

export const canShard = (ranks: Ranks): ranks is OptimizerRanks =>
  [ranks.reduceScatterRows, ranks.allGatherRows, ranks.send, ranks.receive].every(
    member => typeof member === 'function',
  )

/** Ranks that support recorded steps. */
export type RecordableRanks = Ranks & Required<Pick<Ranks, 'allReduceInPlace'>>

/** The numbers of a micro-batch on any rank, and the weight of its gradient. */
export interface WeightedPass extends Pass {
  readonly weight: number
}

/**
 * Gathers the numbers of all ranks' micro-batches, in the order of ranks. All ranks must have equally many
 * micro-batches, with the same metrics.
 *
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

/** Gathers numbers of every rank, `[size][numbers.length]`, rounded to f32. */
export async function gatherNumbers(
  ranks: Ranks,
  numbers: readonly number[],
  like: Pick<Tensor, 'backend'>,
): Promise<number[][]> {
  const all = await gathered(ranks, tensor(numbers, [numbers.length], { backend: like.backend }))
  return Array.from({ length: ranks.size }, (_, r) => [...all.subarray(r * numbers.length, (r + 1) * numbers.length)])
}

/** The global norm over all ranks, rounded to f32. @param parts this rank's part, as `globalNormParts` returns it */
export async function normOverRanks(ranks: Ranks, parts: Tensor): Promise<number> {
  using all = await ranks.allGather(parts)
  const values = await all.values()
  let squares = 0
  for (let at = 0; at < values.length; at += 3) squares += (values[at] + values[at + 1] + values[at + 2]) ** 2
  return Math.fround(Math.sqrt(squares))
}

/** Gathers a JSON value of every rank. */
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

/** Gathers a tensor's elements from all ranks, and frees the tensor. */
async function gathered(ranks: Ranks, own: Tensor): ReturnType<Tensor['values']> {
  using all = await ranks.allGather(own).finally(() => own.dispose())
  return await all.values()
}
