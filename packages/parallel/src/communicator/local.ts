/** @file Several ranks within one process, for tests and experiments. They take turns on one thread. */
import { MoeError } from '@moe/core'
import type { Communicator } from './communicator.ts'
import { overHost } from './host-carrier.ts'
import { type Transport, wrongLength } from './transport.ts'

/**
 * Runs `work` once for each of `size` ranks in this process, with messages passed in memory, and resolves to their results by rank.
 *
 * If a rank fails, calls of other ranks that wait for it fail with E_ABORTED. Once all ranks have ended, the first error is thrown.
 * @param work receives this rank's communicator
 * @throws MoeError E_CONFIG if `size` is not a positive integer
 */
export function local<T>(size: number, work: (communicator: Communicator) => Promise<T>): Promise<T[]> {
  return localOver(size, transport => transport, work)
}

/** Internal. `local` with a wrapper around each rank's transport. */
export async function localOver<T>(
  size: number,
  through: (transport: Transport) => Transport,
  work: (communicator: Communicator) => Promise<T>,
): Promise<T[]> {
  if (!Number.isSafeInteger(size) || size < 1) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'local',
      problem: `the number of ranks is ${size}, expected a positive integer`,
      fix: 'pass local(size, work) a size of 1 or more',
    })
  }
  const queues = new MessageQueues()
  const failures: unknown[] = []
  const one = async (rank: number): Promise<T> => {
    try {
      const result = await work(overHost(through(new LocalTransport(rank, size, queues))))
      queues.end(rank, `rank ${rank} has ended`)
      return result
    } catch (error) {
      failures.push(error)
      queues.end(rank, `rank ${rank} has failed: ${error instanceof Error ? error.message : error}`, error)
      throw error
    }
  }
  const results = await Promise.allSettled(Array.from({ length: size }, (_, rank) => one(rank)))
  if (failures.length > 0) throw failures[0]
  return results.map(result => (result as PromiseFulfilledResult<T>).value)
}

interface Waiting {
  readonly bytes: Uint8Array
  readonly done: () => void
  readonly fail: (error: MoeError) => void
}

/** Unreceived messages and pending receives by channel: "from to lane". */
class MessageQueues {
  readonly #messages = new Map<string, Uint8Array[]>()
  readonly #waiting = new Map<string, Waiting[]>()
  /** Ranks that send no more messages, and why. */
  readonly #ended = new Map<number, { reason: string; cause: unknown }>()

  send(from: number, channel: string, message: Uint8Array): void {
    const waiting = this.#waiting.get(channel)?.shift()
    if (waiting !== undefined) deliver(message, waiting, from)
    else this.#messages.set(channel, [...(this.#messages.get(channel) ?? []), message])
  }

  receive(from: number, channel: string, waiting: Waiting): void {
    const message = this.#messages.get(channel)?.shift()
    if (message !== undefined) deliver(message, waiting, from)
    else if (this.#ended.has(from)) waiting.fail(this.#noMore(from))
    else this.#waiting.set(channel, [...(this.#waiting.get(channel) ?? []), waiting])
  }

  /** Fails all receives that wait for this rank. Messages that it has sent can still be received. */
  end(rank: number, reason: string, cause?: unknown): void {
    this.#ended.set(rank, { reason, cause })
    for (const [channel, list] of this.#waiting) {
      if (!channel.startsWith(`${rank} `)) continue
      for (const { fail } of list.splice(0)) fail(this.#noMore(rank))
    }
  }

  #noMore(rank: number): MoeError {
    const { reason, cause } = this.#ended.get(rank) as { reason: string; cause: unknown }
    return new MoeError({
      code: 'E_ABORTED',
      op: 'local',
      problem: `waiting for a message that will not arrive: ${reason}`,
      fix: 'make the same calls on all ranks',
      cause,
    })
  }
}

function deliver(message: Uint8Array, { bytes, done, fail }: Waiting, from: number): void {
  if (message.length === bytes.length) {
    bytes.set(message)
    done()
  } else fail(wrongLength(message.length, bytes.length, from))
}

class LocalTransport implements Transport {
  readonly rank: number
  readonly size: number
  readonly #queues: MessageQueues

  constructor(rank: number, size: number, queues: MessageQueues) {
    this.rank = rank
    this.size = size
    this.#queues = queues
  }

  async send(bytes: Uint8Array, to: number, lane: number): Promise<void> {
    this.#queues.send(this.rank, `${this.rank} ${to} ${lane}`, bytes.slice())
  }

  receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    return new Promise((done, fail) => {
      this.#queues.receive(from, `${from} ${this.rank} ${lane}`, { bytes, done, fail })
    })
  }

  async close(): Promise<void> {}
}
