/** @file Messages of host arrays over a byte transport. */
import type { HostArray } from '@moe/core'
import type { Carrier, Message } from './carrier.ts'
import type { Communicator } from './communicator.ts'
import { GroupTransport } from './group-transport.ts'
import { hostMemory } from './host-memory.ts'
import { MessageCommunicator } from './message-communicator.ts'
import type { Transport } from './transport.ts'

/** Separates the messages of `send` from those of collective calls. */
const lanes = { pointToPoint: 0, collective: 1 } as const

const bytesOf = ({ buffer, byteOffset, byteLength }: HostArray) => new Uint8Array(buffer, byteOffset, byteLength)

export class HostCarrier implements Carrier<HostArray> {
  readonly rank: number
  readonly size: number
  readonly #transport: Transport
  /** The number of groups created, the same on every rank: it determines the lanes of the next group. */
  #groups = 0

  constructor(transport: Transport) {
    this.rank = transport.rank
    this.size = transport.size
    this.#transport = transport
  }

  async exchange(messages: ReadonlyArray<Message<HostArray>>): Promise<void> {
    await Promise.all(
      messages.map(message =>
        'to' in message
          ? this.#give(message.elements, message.to, lanes.collective)
          : this.#take(message.elements, message.from, lanes.collective),
      ),
    )
  }

  async numbers(give: Int32Array): Promise<Int32Array> {
    const take = give.slice()
    const others = Array.from(give.keys()).filter(rank => rank !== this.rank)
    await this.exchange(
      others.flatMap(rank => [
        { from: rank, elements: take.subarray(rank, rank + 1) },
        { to: rank, elements: give.subarray(rank, rank + 1) },
      ]),
    )
    return take
  }

  async barrier(): Promise<void> {
    // Dissemination barrier: after each round a rank knows of twice as many ranks that have arrived.
    for (let distance = 1; distance < this.size; distance *= 2) {
      const [above, below] = [this.rank + distance, this.rank - distance + this.size]
      await this.exchange([
        { to: above % this.size, elements: new Uint8Array(1) },
        { from: below % this.size, elements: new Uint8Array(1) },
      ])
    }
  }

  send(elements: HostArray, to: number): Promise<void> {
    return this.#give(elements, to, lanes.pointToPoint)
  }

  receive(elements: HostArray, from: number): Promise<void> {
    return this.#take(elements, from, lanes.pointToPoint)
  }

  group(members: readonly number[]): HostCarrier {
    const firstLane = ++this.#groups * Object.keys(lanes).length
    return new HostCarrier(new GroupTransport(this.#transport, members, firstLane))
  }

  close(): Promise<void> {
    return this.#transport.close()
  }

  #give(elements: HostArray, to: number, lane: number): Promise<void> {
    return elements.length === 0 ? Promise.resolve() : this.#transport.send(bytesOf(elements), to, lane)
  }

  #take(elements: HostArray, from: number, lane: number): Promise<void> {
    return elements.length === 0 ? Promise.resolve() : this.#transport.receive(bytesOf(elements), from, lane)
  }
}

/** A communicator over a byte transport. */
export const overHost = (transport: Transport): Communicator =>
  new MessageCommunicator(new HostCarrier(transport), hostMemory)
