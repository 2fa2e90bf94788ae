/** @file Several ranks within one process: for tests, and for learning. They take turns on one thread. */
import { MoeError } from '@moe/core'
import type { Communicator } from './communicator.ts'
import { overHost } from './host-carrier.ts'
import { type Transport, wrongLength } from './transport.ts'

/**
 * Runs `work` once for each of `size` ranks in this process, and resolves to what each returned. Messages are handed over in memory.
 * When a rank fails, what the others wait for fails as well (E_ABORTED), and the first error is the one that is thrown, after all have ended.
 */
export function local<T>(size: number, work: (communicator: Communicator) => Promise<T>): Promise<T[]> {
  return localOver(size, transport => transport, work)
}

/** Internal. The same, with messages that go through something on their way. */
export async function localOver<T>(
  size: number,
  through: (transport: Transport) => Transport,
  work: (communicator: Communicator) => Promise<T>,
): Promise<T[]> {
  if (!Number.isSafeInteger(size) || size < 1) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'local',
      problem: `there cannot be ${size} ranks`,
      fix: 'pass 1 or more',
    })
  }
  const post = new PostOffice()
  const failures: unknown[] = []
  const one = async (rank: number): Promise<T> => {
    try {
      const result = await work(overHost(through(new LocalTransport(rank, size, post))))
      post.end(rank, `rank ${rank} has ended`)
      return result
    } catch (error) {
      failures.push(error)
      post.end(rank, `rank ${rank} has failed: ${error instanceof Error ? error.message : error}`, error)
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

/** Messages that nobody has asked for yet, and who asked for one that is not there, by way: from, to, lane. */
class PostOffice {
  readonly #messages = new Map<string, Uint8Array[]>()
  readonly #waiting = new Map<string, Waiting[]>()
  /** Why nothing comes any more from a rank. */
  readonly #ended = new Map<number, { reason: string; cause: unknown }>()

  put(from: number, way: string, message: Uint8Array): void {
    const waiting = this.#waiting.get(way)?.shift()
    if (waiting !== undefined) hand(message, waiting, from)
    else this.#messages.set(way, [...(this.#messages.get(way) ?? []), message])
  }

  ask(from: number, way: string, waiting: Waiting): void {
    const message = this.#messages.get(way)?.shift()
    if (message !== undefined) hand(message, waiting, from)
    else if (this.#ended.has(from)) waiting.fail(this.#noMore(from))
    else this.#waiting.set(way, [...(this.#waiting.get(way) ?? []), waiting])
  }

  /** Nothing comes any more from a rank; what it has sent can still be received. */
  end(rank: number, reason: string, cause?: unknown): void {
    this.#ended.set(rank, { reason, cause })
    for (const [way, list] of this.#waiting) {
      if (!way.startsWith(`${rank} `)) continue
      for (const { fail } of list.splice(0)) fail(this.#noMore(rank))
    }
  }

  #noMore(rank: number): MoeError {
    const { reason, cause } = this.#ended.get(rank) as { reason: string; cause: unknown }
    return new MoeError({
      code: 'E_ABORTED',
      op: 'local',
      problem: `a message will not come: ${reason}`,
      fix: 'all ranks make the same calls',
      cause,
    })
  }
}

function hand(message: Uint8Array, { bytes, done, fail }: Waiting, from: number): void {
  if (message.length === bytes.length) {
    bytes.set(message)
    done()
  } else fail(wrongLength(message.length, bytes.length, from))
}

class LocalTransport implements Transport {
  readonly rank: number
  readonly size: number
  readonly #post: PostOffice

  constructor(rank: number, size: number, post: PostOffice) {
    this.rank = rank
    this.size = size
    this.#post = post
  }

  async send(bytes: Uint8Array, to: number, lane: number): Promise<void> {
    this.#post.put(this.rank, `${this.rank} ${to} ${lane}`, bytes.slice())
  }

  receive(bytes: Uint8Array, from: number, lane: number): Promise<void> {
    return new Promise((done, fail) => {
      this.#post.ask(from, `${from} ${this.rank} ${lane}`, { bytes, done, fail })
    })
  }

  async close(): Promise<void> {}
}
