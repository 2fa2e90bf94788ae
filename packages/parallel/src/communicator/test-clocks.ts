/** @file For benchmarks only: ranks of one process as if each had a core of its own, on clocks that computing and messages advance. Other processes of the machine change nothing. */
import type { Transport } from './transport.ts'

interface Message {
  readonly bytes: Uint8Array
  /** Milliseconds, of all clocks. */
  readonly at: number
}

interface Waiting {
  readonly to: number
  readonly way: string
  readonly hand: (message: Message) => void
}

/**
 * Ranks compute in turns: who has waited for what comes first goes on until it waits again, and its clock by the processor time that it took. What it sends is there `latency` milliseconds later.
 */
export class Clocks {
  latency = 0
  readonly #times: number[]
  /** Whose turn it is, since when. */
  #running: { readonly rank: number; readonly from: number; readonly begun: NodeJS.CpuUsage } | null = null
  readonly #messages = new Map<string, Message[]>()
  readonly #waiting: Waiting[] = []
  /** Turns of the event loop in which nobody has sent or asked for anything. */
  #quiet = 0
  #watched = false

  constructor(ranks: number) {
    this.#times = new Array(ranks).fill(0)
  }

  /** Milliseconds. */
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
        const way = `${rank} ${to} ${lane}`
        const message = { bytes: bytes.slice(), at: this.now(rank) + this.latency }
        this.#messages.set(way, [...(this.#messages.get(way) ?? []), message])
        this.#watch()
      },
      receive: (bytes, from, lane) =>
        new Promise(done => {
          const hand = (message: Message) => {
            bytes.set(message.bytes)
            done()
          }
          this.#waiting.push({ to: rank, way: `${from} ${rank} ${lane}`, hand })
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
    if (++this.#quiet > 3 && !this.#goOn()) this.#watched = false
    else setImmediate(this.#turn)
  }

  /** Ends a turn, and begins that of whoever can go on first. */
  #goOn(): boolean {
    if (this.#running !== null) this.#times[this.#running.rank] = this.now(this.#running.rank)
    this.#running = null
    let first: { at: number; waiting: Waiting } | null = null
    const seen = new Map<string, number>()
    for (const waiting of this.#waiting) {
      // Messages are handed out in the order of asking.
      const place = seen.get(waiting.way) ?? 0
      seen.set(waiting.way, place + 1)
      const message = this.#messages.get(waiting.way)?.[place]
      if (message === undefined || place > 0) continue
      const at = Math.max(message.at, this.#times[waiting.to])
      if (first === null || at < first.at) first = { at, waiting }
    }
    if (first === null) return false
    const { at, waiting } = first
    this.#waiting.splice(this.#waiting.indexOf(waiting), 1)
    this.#quiet = 0
    this.#running = { rank: waiting.to, from: at, begun: process.cpuUsage() }
    waiting.hand(this.#messages.get(waiting.way)?.shift() as Message)
    return true
  }
}
