/** @file The interface through which ranks communicate; everything in this package is built on it. */
import type { Backend, DType, Rows, Shape, Tensor } from '@moe/core'

/** How a reduction combines the tensors of all ranks. */
export type Reduction = 'sum' | 'mean' | 'max'

/** What a rank receives from `allToAll`. */
export interface RowExchange {
  /** `[sum of counts, ...]`: the rows from rank 0, then those from rank 1, and so on. */
  readonly rows: Tensor
  /** The number of rows received from each rank. */
  readonly counts: readonly number[]
}

/** A tensor for each of some tensors. */
export type TensorEach<T extends readonly Tensor[]> = { -readonly [I in keyof T]: Tensor }

/**
 * One of `size` ranks, with the collective and point-to-point operations between them. `mpi`, `nccl` and `local` create communicators.
 *
 * All ranks must make the same collective calls (everything but `send` and `receive`) in the same order, with tensors of the same shapes and dtypes.
 * Calls may overlap: you need not await one before making the next. Sums are deterministic: every rank and every run gets the same bits.
 *
 * Input tensors remain yours; do not change or dispose of them before the promise resolves. Returned tensors are new, on the backend of the inputs,
 * and belong to no scope: dispose of them yourself. With `mpi` and `local` the data passes through host memory; with `nccl` it goes from device to device.
 */
export interface Communicator {
  /** This rank's number, from 0. */
  readonly rank: number
  /** The number of ranks. */
  readonly size: number
  /**
   * Reduces each tensor (`f32`, `bf16` or `i32`) over all ranks. Sums are taken in f64 in the order of ranks and rounded once. Small tensors in one call
   * are sent together.
   * @param reduction default: `'sum'`; there is no mean of `i32`
   * @throws MoeError E_DTYPE
   */
  allReduce<const T extends readonly Tensor[]>(tensors: T, reduction?: Reduction): Promise<TensorEach<T>>
  /**
   * `allReduce` that writes the results into the given tensors, at the same addresses, where recorded steps read them. Each must have its own
   * memory. Needs a backend with `Backend.write`. Other ranks may call `allReduce` instead.
   * @throws MoeError E_DTYPE, E_BACKEND
   */
  allReduceInPlace(tensors: readonly Tensor[], reduction?: Reduction): Promise<void>
  /** Reduces `[size * n, ...]` over all ranks and returns this rank's n rows of the result. @throws MoeError E_DTYPE, E_SHAPE */
  reduceScatter(tensor: Tensor, reduction?: Reduction): Promise<Tensor>
  /**
   * Sums tensors over all ranks, each row for one rank only: a reduce-scatter with any assignment of rows to ranks. Rank r receives the sums of the rows in
   * `shards[r]`. This is the first half of an `allReduce`; `allGatherRows` is the second. All tensors have the same dtype.
   * @param into where the sums are written, at the same addresses: one tensor for each entry of this rank's shard, which may be the tensor whose rows they
   * are. Needs a backend with `Backend.write`. Default: new tensors
   * @throws MoeError E_DTYPE, E_SHAPE, E_BACKEND
   */
  reduceScatterRows(shards: ReadonlyArray<readonly Rows[]>, into?: readonly Tensor[]): Promise<readonly Tensor[]>
  /**
   * Sends each rank's rows to all ranks: an all-gather with any assignment of rows to ranks. Overwrites the tensors in `shards` at the same addresses; on
   * backends that cannot write, each must be a `Parameter`, which is assigned a new value. Together the shards must cover each tensor.
   * @param own one tensor for each entry of this rank's shard; if the entry is all of a tensor, it may be that tensor
   * @throws MoeError E_DTYPE, E_SHAPE, E_BACKEND
   */
  allGatherRows(shards: ReadonlyArray<readonly Rows[]>, own: readonly Tensor[]): Promise<void>
  /** Concatenates `[n, ...]` of every rank along the first axis, in the order of ranks: `[size * n, ...]`. */
  allGather(tensor: Tensor): Promise<Tensor>
  /**
   * Sends the first `counts[0]` rows to rank 0, the next `counts[1]` to rank 1, and so on. `counts` has an entry for each rank, which may be 0, and may
   * differ between ranks.
   * @param incoming the number of rows that each rank sends to this one, if all ranks know theirs: saves the exchange of the counts
   * @throws MoeError E_SHAPE
   */
  allToAll(rows: Tensor, counts: readonly number[], incoming?: readonly number[]): Promise<RowExchange>
  /** Sends the tensors of rank `root` (default 0) to all ranks. The other ranks pass tensors of the same shapes and dtypes. */
  broadcast<const T extends readonly Tensor[]>(tensors: T, root?: number): Promise<TensorEach<T>>
  /** Sends a tensor to one rank, which receives messages in the order of sending. @throws MoeError E_CONFIG if there is no other rank `to` */
  send(tensor: Tensor, to: number): Promise<void>
  /** Receives the next tensor that rank `from` sends, which must have the given shape and dtype. @throws MoeError E_CONFIG if there is no other rank `from` */
  receive(like: TensorLike, from: number): Promise<Tensor>
  /**
   * Creates a communicator for some of the ranks, including this one, numbered in the given order. All ranks call it, each with its own group, before their
   * next collective call. Operations of a group never wait for those of another group or of all ranks, even if the same ranks form two groups. A group
   * cannot be split further and need not be closed.
   * @throws MoeError E_CONFIG
   */
  group(members: readonly number[]): Communicator
  /** Resolves when every rank has called it. */
  barrier(): Promise<void>
  /**
   * Ends communication; every rank calls it once nothing is in progress. Do not call it after a failure: other ranks may still be waiting, and their launcher
   * ends them when this process exits without closing.
   */
  close(): Promise<void>
}

/** The shape, dtype and backend of a tensor to be received. */
export interface TensorLike {
  /** Sizes of the axes. */
  readonly shape: Shape
  /** Element type. */
  readonly dtype: DType
  /** Default: the default backend. */
  readonly backend?: Backend
}
