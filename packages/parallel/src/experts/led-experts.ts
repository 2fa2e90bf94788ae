/**
 * @file Experts of several ranks in forward passes of one rank, the leader. The other ranks have no tokens of their own: layer by layer, they wait for those of
 * the leader, and return what their experts make of them.
 */
import { type Backend, fromHost, MoeError, type Precision, precisions } from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import { Failure } from '../failure.ts'
import type { ExpertShards, RouteTokens } from './expert-shards.ts'
import { PiecewisePass } from './piecewise-pass.ts'
import { computeRows, route } from './route-over-ranks.ts'

/** Numbers in a call before the row counts: layer, precision, features of a row. */
const header = 3

/** The shards of ranks of which the first leads. */
export class LedExperts {
  readonly #shards: ExpertShards
  readonly #ranks: Communicator
  readonly #backend: Backend
  /** Numbers in a call of the leader. */
  readonly #width: number
  /** The latest call of the leader. A call ends before the next one begins, whichever passes they belong to. */
  #last: Promise<unknown> = Promise.resolve()
  #state: 'open' | 'ended' | 'failed' = 'open'
  /** For the leader: the failure of an exchange with the other ranks. */
  readonly failure = new Failure()

  constructor(shards: ExpertShards, backend: Backend) {
    this.#shards = shards
    this.#ranks = shards.sharing
    this.#backend = backend
    this.#width = header + Math.max(0, ...shards.layers.map(layer => this.#own(layer)))
  }

  /** For the leader: the routing function for pieces of a pass without gradients. */
  routeIn(pass: PiecewisePass, precision: Precision): RouteTokens {
    return (layer, tokens) => {
      const { shard, experts } = this.#shards.of(layer)
      const own = this.#own(layer)
      let called = false
      const exchange = async (counts: Int32Array<ArrayBuffer>) => {
        const calls = Array.from({ length: this.#ranks.size }, (_, r) => counts.subarray(r * own, (r + 1) * own))
        called = true
        await this.#call(
          calls.slice(1).flatMap(to => {
            const numbers = [layer, precisions.indexOf(precision), tokens.x.shape[1], ...to]
            return [...numbers, ...new Array<number>(this.#width - numbers.length).fill(0)]
          }),
        )
        return calls.map((to, rank) => (rank === 0 ? to : new Int32Array(own)))
      }
      return this.#inTurn(async () => {
        try {
          return await route(pass, this.#ranks, shard, tokens, experts, { exchange })
        } catch (error) {
          // The other ranks wait for what this call has announced.
          if (called) this.#failed(error)
          throw error
        }
      })
    }
  }

  /** For the leader: ends `follow` of the other ranks, after the calls that have been made. */
  async end(): Promise<void> {
    await this.#inTurn(async () => {
      this.#state = 'ended'
      await this.#call([])
    }).catch(error => {
      // After a failure, the other ranks may be waiting for something else.
      if (this.#state !== 'failed') throw error
    })
  }

  /** For the other ranks: computes experts for the leader until it ends. */
  async follow(): Promise<void> {
    const { size } = this.#ranks
    const none = new Array<number>(size).fill(0)
    const make = <T extends Int32Array<ArrayBuffer> | Float32Array<ArrayBuffer>>(data: T, features: number) =>
      fromHost(data, [0, features], data instanceof Int32Array ? 'i32' : 'f32', this.#backend)
    for (;;) {
      const nothing = make(new Int32Array(), this.#width)
      const { rows, counts } = await this.#ranks.allToAll(nothing, none).finally(() => nothing.dispose())
      const numbers = Int32Array.from(await rows.values())
      rows.dispose()
      if (counts[0] === 0) return
      const [layer, precision, features] = numbers
      const own = this.#own(layer)
      const incoming = none.map((_, rank) =>
        rank === 0 ? numbers.subarray(header, header + own) : new Int32Array(own),
      )
      const pass = new PiecewisePass({ precision: precisions[precision], backward: false })
      try {
        const sorted = pass.run(() => make(new Float32Array(), features))
        await computeRows(pass, this.#ranks, this.#shards.of(layer).shard, sorted, { sent: none, incoming, own })
      } finally {
        pass.dispose()
      }
    }
  }

  #own(layer: number): number {
    return this.#shards.of(layer).experts / this.#ranks.size
  }

  /** Sends numbers to the other ranks, the same amount to each. They wait for the number of rows, which is sent between hosts, so that waiting does not occupy a device. */
  async #call(numbers: readonly number[]): Promise<void> {
    const { size } = this.#ranks
    const each = numbers.length === 0 ? 0 : 1
    const shape = [each * (size - 1), this.#width]
    const rows = fromHost(Int32Array.from(numbers), shape, 'i32', this.#backend)
    const counts = Array.from({ length: size }, (_, rank) => (rank === 0 ? 0 : each))
    const received = await this.#ranks.allToAll(rows, counts).finally(() => rows.dispose())
    received.rows.dispose()
  }

  #failed(error: unknown): void {
    this.#state = 'failed'
    this.failure.report(error)
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#last.then(() => {
      if (this.#state !== 'open') throw over(this.#state)
      return work()
    })
    this.#last = done.catch(() => undefined)
    return done
  }
}

const over = (state: 'ended' | 'failed'): MoeError =>
  state === 'ended'
    ? new MoeError({
        code: 'E_DISPOSED',
        op: 'lead',
        problem: 'the other ranks no longer compute experts for this one',
        fix: 'let all texts end before the function that you pass to lead() returns',
      })
    : new MoeError({
        code: 'E_ABORTED',
        op: 'lead',
        problem: 'an earlier exchange with the other ranks has failed',
        fix: 'let the error end this process, and start all ranks again',
      })
