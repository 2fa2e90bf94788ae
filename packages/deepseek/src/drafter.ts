/** @file MTP modules that draft tokens ahead of the main model. */
import type { SequenceCache } from '@moe/attention-mla'
import { concat, fromHost, keep, type Precision, type Tensor } from '@moe/core'
import { type CachedPass, CachedPasses } from './cached-passes.ts'
import type { DeepSeek } from './model.ts'
import { scoresOf } from './sampling.ts'

type Draft = {
  /** What the next depth continues from, `[B, n, D]`. */
  readonly next: Tensor
  /** The token after the last position that stands, `i32 [B, 1, 1]`. */
  readonly best: Tensor
}

/**
 * What the modules keep of a text between two passes: for each the state of the depth before at the position where it goes on, `[1, 1, D]`, if the token that it needs
 * there is not certain yet.
 */
export class DraftMemory {
  #waiting: ReadonlyArray<Tensor | null> = []

  /** Positions that the last module is behind the main model. */
  get behind(): number {
    return this.#waiting.filter(state => state !== null).length
  }

  /** Texts for which this is the same go through the modules together. */
  get kind(): string {
    return this.#waiting.map(state => (state === null ? '-' : '+')).join('')
  }

  /** The states are the caller's from here on. */
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

/** A text that the main model has gone on with. */
interface Drafted {
  /** All its tokens that are certain. */
  readonly tokens: readonly number[]
  /** How many of its latest hidden states stand. */
  readonly confirmed: number
  readonly memory: DraftMemory
}

/**
 * Drafts one token per depth. Module k runs over position i with the hidden state of depth k - 1 there and token i + k; positions whose token i + k is itself only
 * drafted are run again once it is known. The modules' layers of a cache stand behind those of the main model.
 */
export class Drafter {
  readonly depth: number
  readonly #model: DeepSeek
  readonly #precision: Precision
  readonly #passes = new Map<SequenceCache, ReadonlyArray<CachedPasses<Draft>>>()

  constructor(model: DeepSeek, depth: number, precision: Precision) {
    this.depth = depth
    this.#model = model
    this.#precision = precision
  }

  /** From the latest states `hidden [B, n, D]` of texts of one kind, which the cache holds as far as they stand. */
  async draft(cache: SequenceCache, hidden: Tensor, texts: readonly Drafted[]): Promise<number[][]> {
    const drafts: number[][] = texts.map(() => [])
    const ends = Array.from(cache.lengths)
    const held: Tensor[] = []
    const hold = (fn: () => Tensor) => held[held.push(this.#infer(fn)) - 1]
    const waited = texts.map(({ memory }) => memory.take())
    const waits: Array<Array<Tensor | null>> = texts.map(() => [])
    try {
      // What does not stand is run on only where another text has more that does: its results are written over.
      const most = Math.max(...texts.map(({ confirmed }) => confirmed))
      let incoming = this.depth > 0 ? hold(() => hidden.narrow(1, 0, most).detach()) : hidden
      let starts = texts.map(({ confirmed }, b) => ends[b] - confirmed)
      /** Positions that stand at the depth before. */
      let before = ends
      for (const [k, passes] of this.#passesOf(cache).entries()) {
        const waiting = waited.flatMap(states => states[k] ?? [])
        const last = incoming
        const inputs = waiting.length === 0 ? last : hold(() => concat([concat(waiting, 0), last], 1))
        const [, time, features] = inputs.shape
        const begun = starts.map(start => start - (time - last.shape[1]))
        // Position i is given token i + k + 1; the last ones of deeper modules are drafts of the shallower ones.
        const ahead = Int32Array.from({ length: texts.length * time }, (_, i) => {
          const b = Math.floor(i / time)
          const { tokens } = texts[b]
          const at = begun[b] + (i % time) + k + 1
          return tokens[at] ?? drafts[b][at - tokens.length] ?? 0
        })
        const numbers = Int32Array.from(ends, (end, b) => b * time + end - 1 - begun[b])
        cache.truncate(begun)
        const { next, best } = passes.run('', this.#pass(cache, k), ahead, { states: inputs, numbers })
        held.push(next, best)
        for (const [b, token] of (await best.values()).entries()) drafts[b].push(token)
        const certain = texts.map(({ tokens }, b) => Math.min(ends[b], Math.max(begun[b], tokens.length - k - 1)))
        for (const [b, states] of waits.entries()) {
          const at = b * time + certain[b] - begun[b]
          // A copy: the next pass of the depth before may write over its results.
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

  #pass(cache: SequenceCache, k: number): CachedPass<Draft> {
    const module = this.#model.mtp[k]
    const layer = this.#model.decoder.length + k
    return (ids, states, last) => {
      const next = module.normalize(module.forward(states as Tensor, ids, { cache, layer }))
      const [batch, time, features] = next.shape
      cache.advance(time)
      const rows = next.reshape([batch * time, features]).takeRows(last as Tensor)
      return { next, best: scoresOf(module.score(rows.reshape([batch, 1, features]))) }
    }
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
