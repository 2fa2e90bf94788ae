/** @file Byte messages between two ranks: all that a `Communicator` on hosts needs. */
import { MoeError } from '@moe/core'

/** Sends and receives byte messages. Messages from one rank to another on the same lane arrive in the order in which they were sent. */
export interface Transport {
  readonly rank: number
  readonly size: number
  /** Sends a message, never to this rank itself and never an empty one. It is queued when this returns; the promise resolves when the bytes may be changed. */
  send(bytes: Uint8Array, to: number, lane: number): Promise<void>
  /** Fills `bytes` with the next message. @throws MoeError E_SHAPE if that message has another length, E_ABORTED if no message will arrive any more */
  receive(bytes: Uint8Array, from: number, lane: number): Promise<void>
  close(): Promise<void>
}

/** The error for a message of another length than expected. */
export function wrongLength(received: number, expected: number, from: number): MoeError {
  return new MoeError({
    code: 'E_SHAPE',
    op: 'receive',
    problem: `received ${received} bytes from rank ${from}, expected ${expected}`,
    fix: 'make the same calls on all ranks, with tensors of the same shapes and dtypes',
  })
}
