/** @file The transport of a group of ranks. */
import type { Transport } from './transport.ts'

/** The given ranks of another transport, numbered in this order, on separate lanes. */
export class GroupTransport implements Transport {
  readonly rank: number
  readonly size: number
  readonly #whole: Transport
  readonly #members: readonly number[]
  readonly #firstLane: number

  constructor(whole: Transport, members: readonly number[], firstLane: number) {
    this.rank = members.indexOf(whole.rank)
    this.size = members.length
    this.#whole = whole
    this.#members = members
    this.#firstLane = firstLane
  }

  send(bytes: Uint8Array, to: number, lane: number): Promise<void> {
    return this.#whole.send(bytes, this.#members[to], this.#firstLane + lane)
  }

  receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    return this.#whole.receive(bytes, this.#members[from], this.#firstLane + lane)
  }

  async close(): Promise<void> {}
}
