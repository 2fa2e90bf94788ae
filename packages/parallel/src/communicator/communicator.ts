/** @file What ranks say to each other: the one interface that everything here is built on. */
import type { Backend, DType, Rows, Shape, Tensor } from '@moe/core'

/** How the tensors of several ranks become one. */
export type Reduction = 'sum' | 'mean' | 'max'

/** What a rank has after an exchange of rows. */
export interface RowExchange {
  /** `[sum of counts, ...]`: what came from rank 0, then from rank 1, and so on. */
  readonly rows: Tensor
  /** Rows that came from each rank. */
  readonly counts: readonly number[]
}

/**
 * One of `size` ranks. All of them make the same calls of everything but `send` and `receive` in the same order, with tensors of the same shapes and dtypes; calls need not be awaited
 * one by one. Tensors that are given stay the caller's, who neither changes nor frees them before the promise resolves; tensors that are resolved to are new, of the backend that the given
 * one has, in no scope: the caller disposes of them.
 *
 * Sums are deterministic: the same bits on every rank and in every run.
 *
 * Numbers pass through the host with `mpi` and `local`, from device to device with `nccl`. A promise resolves when what it is for is through.
 */
export interface Communicator {
  /** Number of this rank, from 0. */
  readonly rank: number
  /** Number of ranks. */
  readonly size: number
  /**
   * Tensors `f32`, `bf16` or `i32`, each reduced over the ranks. Sums are taken in the order of ranks and rounded once. Many small ones in one call travel together.
   * @throws MoeError E_DTYPE
   */
  allReduce(tensors: readonly Tensor[], reduction?: Reduction): Promise<Tensor[]>
  /**
   * The same, with the results in the place of what was given, at the same addresses: what a recorded graph reads. For backends that can write (`Backend.write`). Goes together with
   * `allReduce` of other ranks.
   * @throws MoeError E_DTYPE, E_BACKEND
   */
  allReduceInPlace(tensors: readonly Tensor[], reduction?: Reduction): Promise<void>
  /** `[size n, ...]` to this rank's n rows of the reduction. @throws MoeError E_DTYPE, E_SHAPE */
  reduceScatter(tensor: Tensor, reduction?: Reduction): Promise<Tensor>
  /**
   * Of tensors that all ranks have, sums over the ranks, each for one rank alone: `shares[r]` are the rows whose sums rank r is given. Half of an `allReduce`, of which `gatherShares` is the other half. All are of one dtype.
   * @param into where the sums are put, at the same addresses: a tensor for each of this rank's rows, which may be what they are rows of. For backends that can write. Default: new tensors
   * @throws MoeError E_DTYPE, E_SHAPE, E_BACKEND
   */
  reduceShares(shares: ReadonlyArray<readonly Rows[]>, into?: readonly Tensor[]): Promise<readonly Tensor[]>
  /**
   * Gives all ranks what each has for its share: the rows of the tensors become those, at the same addresses, or, on backends that cannot write, what a `Parameter` is assigned. Together the shares make up each tensor.
   * @param own a tensor for each of this rank's rows; where these are all rows of a tensor, it may be that one
   * @throws MoeError E_DTYPE, E_SHAPE, E_BACKEND
   */
  gatherShares(shares: ReadonlyArray<readonly Rows[]>, own: readonly Tensor[]): Promise<void>
  /** `[n, ...]` of every rank, one below the other: `[size n, ...]`. */
  allGather(tensor: Tensor): Promise<Tensor>
  /**
   * Sends the first `counts[0]` rows to rank 0, the next `counts[1]` to rank 1 and so on; `counts` has a number for each rank and may differ between ranks.
   * @param coming rows that come from each rank, where all ranks know theirs: then nobody has to be told before rows leave
   * @throws MoeError E_SHAPE
   */
  allToAll(rows: Tensor, counts: readonly number[], coming?: readonly number[]): Promise<RowExchange>
  /** The tensors of rank `root` (default 0), on every rank. */
  broadcast(tensors: readonly Tensor[], root?: number): Promise<Tensor[]>
  /** To one rank, which receives in the order of sending. @throws MoeError E_CONFIG for a rank that there is not */
  send(tensor: Tensor, to: number): Promise<void>
  /** What rank `from` sends next, which must be of this shape and dtype. */
  receive(like: TensorLike, from: number): Promise<Tensor>
  /**
   * Some of the ranks, this one among them, as ranks of their own, numbered in this order. All ranks call it, each with its group, before their next calls. Nothing in a group waits for calls of another one, nor of all ranks, even where it is the
   * same ranks that were grouped twice. A group is not taken apart further, and need not be closed.
   * @throws MoeError E_CONFIG
   */
  group(members: readonly number[]): Communicator
  /** Resolves when every rank has called it. */
  barrier(): Promise<void>
  /** The end, on every rank; nothing may be under way. Not for after a failure: other ranks may still wait, and are ended by their launcher when this process ends. */
  close(): Promise<void>
}

/** What a tensor that is yet to come will be like. */
export interface TensorLike {
  /** Sizes of the axes. */
  readonly shape: Shape
  /** Element type. */
  readonly dtype: DType
  /** Default: the default backend. */
  readonly backend?: Backend
}
