/** @file For tests only: a transport that delays messages. */
import type { Transport } from './transport.ts'

const now = () => performance.timeOrigin + performance.now()

/** Delivers each message `delay(bytes)` milliseconds after it is sent, in any process of this machine. */
export class DelayedTransport implements Transport {
  readonly rank: number
  readonly size: number
  readonly #transport: Transport
  readonly #delay: (bytes: number) => number

  constructor(transport: Transport, delay: (bytes: number) => number) {
    this.rank = transport.rank
    this.size = transport.size
    this.#transport = transport
    this.#delay = delay
  }

  send(bytes: Uint8Array, to: number, lane: number): Promise<void> {
    const stamped = new Uint8Array(8 + bytes.length)
    new DataView(stamped.buffer).setFloat64(0, now() + this.#delay(bytes.length))
    stamped.set(bytes, 8)
    return this.#transport.send(stamped, to, lane)
  }

  async receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    const stamped = new Uint8Array(8 + bytes.length)
    await this.#transport.receive(stamped, from, lane)
    const left = new DataView(stamped.buffer).getFloat64(0) - now()
    if (left > 0) await new Promise(done => setTimeout(done, left))
    bytes.set(stamped.subarray(8))
  }

  close(): Promise<void> {
    return this.#transport.close()
  }
}
