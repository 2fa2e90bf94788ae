/** @file For benchmarks only: simulates one core per rank within one process. Each rank has a clock that computation and messages advance, so other processes on the machine have no influence. */
import type { Transport } from './transport.ts'

interface Message {
  readonly bytes: Uint8Array
  /** Time of arrival in milliseconds, on all clocks. */
  readonly at: number
}

interface Waiting {
  readonly to: number
  readonly channel: string
  readonly deliver: (message: Message) => void
}

/**
 * Ranks compute in turns. The rank whose awaited message arrives first runs until it waits again, and its clock advances by the processor time used. A message arrives `latency` milliseconds after it is sent.
 */
export class Clocks {
  latency = 0
  readonly #times: number[]
  /** The rank that runs now, its time at the start of its turn, and the processor time then. */
  #running: { readonly rank: number; readonly from: number; readonly begun: NodeJS.CpuUsage } | null = null
  readonly #messages = new Map<string, Message[]>()
  readonly #waiting: Waiting[] = []
  /** Turns of the event loop since the last send or receive. */
  #quiet = 0
  #watched = false

  constructor(ranks: number) {
    this.#times = new Array(ranks).fill(0)
  }

  /** The rank's time in milliseconds. */
  now(rank: number): number {
    if (this.#running?.rank !== rank) return this.#times[rank]
    const { user, system } = process.cpuUsage(this.#running.begun)
    return this.#running.from + (user + system) / 1000
  }

  through(transport: Transport): Transport {
    const { rank, size } = transport
    return {
      rank,
      size,
      send: async (bytes, to, lane) => {
        const channel = `${rank} ${to} ${lane}`
        const message = { bytes: bytes.slice(), at: this.now(rank) + this.latency }
        this.#messages.set(channel, [...(this.#messages.get(channel) ?? []), message])
        this.#watch()
      },
      receive: (bytes, from, lane) =>
        new Promise(done => {
          const deliver = (message: Message) => {
            bytes.set(message.bytes)
            done()
          }
          this.#waiting.push({ to: rank, channel: `${from} ${rank} ${lane}`, deliver })
          this.#watch()
        }),
      close: async () => {},
    }
  }

  #watch(): void {
    this.#quiet = 0
    if (this.#watched) return
    this.#watched = true
    setImmediate(this.#turn)
  }

  #turn = (): void => {
    if (++this.#quiet > 3 && !this.#nextTurn()) this.#watched = false
    else setImmediate(this.#turn)
  }

  /** Ends the current turn, and starts that of the rank that can continue first. @returns false if all ranks wait */
  #nextTurn(): boolean {
    if (this.#running !== null) this.#times[this.#running.rank] = this.now(this.#running.rank)
    this.#running = null
    let first: { at: number; waiting: Waiting } | null = null
    const seen = new Map<string, number>()
    for (const waiting of this.#waiting) {
      // Messages are delivered in the order of the receives.
      const place = seen.get(waiting.channel) ?? 0
      seen.set(waiting.channel, place + 1)
      const message = this.#messages.get(waiting.channel)?.[place]
      if (message === undefined || place > 0) continue
      const at = Math.max(message.at, this.#times[waiting.to])
      if (first === null || at < first.at) first = { at, waiting }
    }
    if (first === null) return false
    const { at, waiting } = first
    this.#waiting.splice(this.#waiting.indexOf(waiting), 1)
    this.#quiet = 0
    this.#running = { rank: waiting.to, from: at, begun: process.cpuUsage() }
    waiting.deliver(this.#messages.get(waiting.channel)?.shift() as Message)
    return true
  }
}
