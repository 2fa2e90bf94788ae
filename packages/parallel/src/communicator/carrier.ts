/** @file What a `MessageCommunicator` is built on: messages between ranks, and the memory that holds their elements. */
import type { DType, Tensor } from '@moe/core'
import type { Reduction, TensorLike } from './communicator.ts'

/**
 * Elements to send to rank `to`, or memory to fill with elements from rank `from`. `E` is a contiguous run of elements of one dtype, on the host or
 * on a device. If there are no elements, nothing is sent.
 */
export type Message<E> = { readonly to: number; readonly elements: E } | { readonly from: number; readonly elements: E }

/** Moves elements between ranks. Calls of `exchange`, `numbers` and `barrier` are made one after another, in the same order on all ranks. */
export interface Carrier<E> {
  readonly rank: number
  readonly size: number
  /** Sends and receives several messages at once, each to or from another rank. Resolves when all have arrived and the sent memory may be changed. */
  exchange(messages: ReadonlyArray<Message<E>>): Promise<void>
  /** Sends `give[r]` to rank r. @returns the number that each rank sent to this one */
  numbers(give: Int32Array): Promise<Int32Array>
  barrier(): Promise<void>
  /** Sends a point-to-point message, independent of `exchange`. The message is queued when this returns; the promise resolves when the elements may be changed. */
  send(elements: E, to: number): Promise<void>
  /** Fills the elements with the next message that `from` sends with `send`. */
  receive(elements: E, from: number): Promise<void>
  /** A group of ranks, numbered in this order. All ranks create their groups at the same time. */
  group(members: readonly number[]): Carrier<E>
  close(): Promise<void>
}

/** The memory that holds elements. */
export interface Memory<E> {
  /** The elements of a tensor, read-only. */
  of(tensor: Tensor): Promise<E>
  /** Opens temporary memory for one call. */
  open(): Workspace<E>
}

/** Temporary memory of one call, and the operations on it. */
export interface Workspace<E> {
  make(dtype: DType, length: number): E
  /** Elements `from` to `to` (exclusive) of memory from `make` or of a tensor; a view. */
  part(of: E, from: number, to: number): E
  /** Copies `from` to `to`, which have the same length. */
  copy(to: E, from: E): void
  /** Sets `to` to the reduction of the parts in their order, rounded once. `to` may be one of the parts. */
  reduce(to: E, parts: readonly E[], dtype: DType, reduction: Reduction): void
  /** A new tensor with a copy of these elements. */
  tensor(elements: E, like: TensorLike): Tensor
  /**
   * Overwrites the elements of a tensor, in place if the backend supports it; otherwise only a `Parameter` can be assigned.
   * @throws MoeError E_BACKEND if the backend cannot write and the tensor is not a `Parameter`
   */
  write(tensor: Tensor, elements: E): void
  /** Frees the memory. @param failed whether the call has failed, in which case messages may still arrive in it */
  close(failed: boolean): void
}
