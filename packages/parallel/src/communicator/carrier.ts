/** @file What a `MessageCommunicator` is made over: messages between ranks, and the memory that they come from and go to. */
import type { DType, Tensor } from '@moe/core'
import type { Reduction, TensorLike } from './communicator.ts'

/** Elements for rank `to`, or memory to be filled with those from rank `from`. `E` is a run of elements of one dtype, in whatever memory. No elements are no message. */
export type Message<E> = { readonly to: number; readonly elements: E } | { readonly from: number; readonly elements: E }

/** Moves elements between ranks. Calls of `exchange`, `numbers` and `barrier` come one after another, in the same order on all ranks. */
export interface Carrier<E> {
  readonly rank: number
  readonly size: number
  /** Messages that are under way at once, each to or from another rank. Resolves when all have come and what was sent may be changed. */
  exchange(messages: ReadonlyArray<Message<E>>): Promise<void>
  /** Gives `give[r]` to rank r. @returns what each gives to this one */
  numbers(give: Int32Array): Promise<Int32Array>
  barrier(): Promise<void>
  /** A message apart from those. Is on its way when this returns; resolves when the elements may be changed. */
  send(elements: E, to: number): Promise<void>
  /** Fills the elements with what that rank sends next. */
  receive(elements: E, from: number): Promise<void>
  /** Some of the ranks, in this order. All ranks make groups at the same time. */
  group(members: readonly number[]): Carrier<E>
  close(): Promise<void>
}

/** Where elements lie, and what is done with them there. */
export interface Memory<E> {
  /** The elements of a tensor, not to be written to. */
  of(tensor: Tensor): Promise<E>
  /** Working memory for one call. */
  open(): Workspace<E>
}

/** What a call makes for itself. */
export interface Workspace<E> {
  make(dtype: DType, length: number): E
  /** Elements `from` to `to` of what `make` made, or of a tensor. */
  part(of: E, from: number, to: number): E
  /** As many elements. */
  copy(to: E, from: E): void
  /** `to` becomes the parts reduced in their order, rounded once; it may be one of them. */
  reduce(to: E, parts: readonly E[], dtype: DType, reduction: Reduction): void
  /** A tensor of its own with these elements. */
  tensor(elements: E, like: TensorLike): Tensor
  /** Gives a tensor other elements, in its place where the backend can write. @throws MoeError E_BACKEND where it cannot, but for a `Parameter` */
  write(tensor: Tensor, elements: E): void
  /** The call has ended. */
  close(): void
}
