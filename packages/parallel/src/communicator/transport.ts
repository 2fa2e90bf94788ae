/** @file Messages of bytes between two ranks: all that a `Communicator` on hosts needs. */
import { MoeError } from '@moe/core'

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

/** What came is not what was asked for. */
export function wrongLength(came: number, wanted: number, from: number): MoeError {
  return new MoeError({
    code: 'E_SHAPE',
    op: 'receive',
    problem: `${came} bytes came from rank ${from} where ${wanted} were expected`,
    fix: 'all ranks make the same calls, with tensors of the same shapes and dtypes',
  })
}
