/** @file Messages of bytes between two ranks: all that a `Communicator` on hosts needs. */

/** Messages from one rank to another on one lane arrive in the order in which they were sent. */
export interface Transport {
  readonly rank: number
  readonly size: number
  /** Is on its way when this returns; resolves when the bytes may be changed. Never sent to itself, never empty. */
  send(bytes: Uint8Array, to: number, lane: number): Promise<void>
  /** Fills `bytes` with the next message. @throws MoeError E_SHAPE when that has another length, E_ABORTED when it will never come */
  receive(bytes: Uint8Array, from: number, lane: number): Promise<void>
  close(): Promise<void>
}
