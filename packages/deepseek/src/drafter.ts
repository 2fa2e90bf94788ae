/** @file Drafts tokens with the MTP modules, for speculative decoding. */
import type { SequenceCache } from '@moe/attention-mla'
import { concat, fromHost, keep, MoeError, type Precision, type Tensor } from '@moe/core'
import { type CachedPass, CachedPasses } from './cached-passes.ts'
import type { Network } from './network.ts'
import { scoresOf } from './sampling.ts'

type Draft = {
  /** Hidden states that the next depth continues from, `[B, n, D]`. */
  readonly next: Tensor
  /** The token after the last confirmed position, `i32 [B, 1, 1]`. */
  readonly best: Tensor
}

/**
 * State of the MTP modules between two passes over a text. A module that lacks the token it needs at its next position keeps the hidden state of the previous depth there, `[1, 1, D]`.
 */
export class DraftMemory {
  #waiting: ReadonlyArray<Tensor | null> = []

  /** Number of positions by which the last module is behind the main model. */
  get behind(): number {
    return this.#waiting.filter(state => state !== null).length
  }

  /** Texts with the same kind can share a pass of the modules. */
  get kind(): string {
    return this.#waiting.map(state => (state === null ? '-' : '+')).join('')
  }

  /** Hands the states over to the caller, who must dispose of them. */
  take(): ReadonlyArray<Tensor | null> {
    const waiting = this.#waiting
    this.#waiting = []
    return waiting
  }

  put(waiting: ReadonlyArray<Tensor | null>): void {
    this.#waiting = waiting
  }

  forget(): void {
    for (const state of this.take()) state?.dispose()
  }
}

/**
 * Returns the number of modules that draft tokens: all or none.
 * @throws MoeError E_ATTR if drafts are requested from a model without modules
 */
export function draftDepth(op: string, model: Network, speculative = false): number {
  const depth = speculative ? model.mtp.length : 0
  if (!speculative || depth > 0) return depth
  const problem = 'speculative = true, but the model has no MTP modules (num_nextn_predict_layers = 0)'
  throw new MoeError({ code: 'E_ATTR', op, problem, fix: 'pass { speculative: model.mtp.length > 0 }' })
}

/** A text to draft for, after a pass of the main model. */
interface Drafted {
  /** All confirmed tokens. */
  readonly tokens: readonly number[]
  /** How many of the latest hidden states belong to confirmed tokens. */
  readonly confirmed: number
  readonly memory: DraftMemory
}

/**
 * Drafts one token per depth. Module k processes position i with the hidden state of depth k - 1 there and token i + k. Positions whose token i + k is only drafted are processed again once it is
 * known. In the cache, the layers of the modules follow those of the main model.
 */
export class Drafter {
  readonly depth: number
  readonly #model: Network
  readonly #precision: Precision
  readonly #passes = new Map<SequenceCache, ReadonlyArray<CachedPasses<Draft>>>()

  constructor(model: Network, depth: number, precision: Precision) {
    this.depth = depth
    this.#model = model
    this.#precision = precision
  }

  /** Drafts from the latest hidden states `[B, n, D]` of texts of the same kind. The cache must contain exactly the confirmed positions. */
  async draft(cache: SequenceCache, hidden: Tensor, texts: readonly Drafted[]): Promise<number[][]> {
    const drafts: number[][] = texts.map(() => [])
    const ends = Array.from(cache.lengths)
    const held: Tensor[] = []
    const hold = (fn: () => Tensor) => held[held.push(this.#infer(fn)) - 1]
    const waited = texts.map(({ memory }) => memory.take())
    const waits: Array<Array<Tensor | null>> = texts.map(() => [])
    try {
      // Unconfirmed positions are processed only if another text has more confirmed ones. Their results are overwritten later.
      const most = Math.max(...texts.map(({ confirmed }) => confirmed))
      let incoming = this.depth > 0 ? hold(() => hidden.narrow(1, 0, most).detach()) : hidden
      let starts = texts.map(({ confirmed }, b) => ends[b] - confirmed)
      /** Number of confirmed positions at the previous depth. */
      let before = ends
      for (const [k, passes] of this.#passesOf(cache).entries()) {
        const waiting = waited.flatMap(states => states[k] ?? [])
        const last = incoming
        const inputs = waiting.length === 0 ? last : hold(() => concat([concat(waiting, 0), last], 1))
        const [, time, features] = inputs.shape
        const begun = starts.map(start => start - (time - last.shape[1]))
        // Position i needs token i + k + 1. For deeper modules, the last of these are drafts of the previous modules.
        const ahead = Int32Array.from({ length: texts.length * time }, (_, i) => {
          const b = Math.floor(i / time)
          const { tokens } = texts[b]
          const at = begun[b] + (i % time) + k + 1
          return tokens[at] ?? drafts[b][at - tokens.length] ?? 0
        })
        const numbers = Int32Array.from(ends, (end, b) => b * time + end - 1 - begun[b])
        cache.truncate(begun)
        const { next, best } = await passes.run('', this.#pass(k), ahead, { states: inputs, numbers })
        held.push(next, best)
        for (const [b, token] of (await best.values()).entries()) drafts[b].push(token)
        const certain = texts.map(({ tokens }, b) => Math.min(ends[b], Math.max(begun[b], tokens.length - k - 1)))
        for (const [b, states] of waits.entries()) {
          const at = b * time + certain[b] - begun[b]
          // Copied, because the next pass of the previous depth may overwrite its results.
          const row = () => inputs.reshape([texts.length * time, features]).takeRows(this.#number(at))
          states.push(certain[b] === before[b] ? null : this.#infer(() => row().reshape([1, 1, features])))
        }
        incoming = next
        starts = begun
        before = certain
      }
      cache.truncate(ends)
      for (const [b, { memory }] of texts.entries()) memory.put(waits[b].splice(0))
      return drafts
    } finally {
      for (const tensor of [...held, ...waited.flat(), ...waits.flat()]) tensor?.dispose()
    }
  }

  #passesOf(cache: SequenceCache): ReadonlyArray<CachedPasses<Draft>> {
    let passes = this.#passes.get(cache)
    if (passes === undefined) {
      const make = () => new CachedPasses<Draft>(this.#model, cache, this.#precision)
      passes = Array.from({ length: this.depth }, make)
      this.#passes.set(cache, passes)
    }
    return passes
  }

  #pass(k: number): CachedPass<Draft> {
    const module = this.#model.mtp[k]
    const finish = (next: Tensor, last: Tensor | undefined) => {
      const [batch, time, features] = next.shape
      const rows = next.reshape([batch * time, features]).takeRows(last as Tensor)
      return { next, best: scoresOf(module.score(rows.reshape([batch, 1, features]))) }
    }
    return { depth: k + 1, finish }
  }

  #number(value: number): Tensor {
    return fromHost(Int32Array.of(value), [1], 'i32', this.#model.backend)
  }

  #infer<T>(fn: () => T): T {
    return keep(this.#model.infer(fn, { precision: this.#precision }))
  }

  dispose(): void {
    for (const passes of this.#passes.values()) for (const each of passes) each.dispose()
    this.#passes.clear()
  }
}
