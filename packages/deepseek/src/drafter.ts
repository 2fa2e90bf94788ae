/** @file MTP modules that draft tokens ahead of the main model. */
import { type CacheOptions, LatentCache } from '@moe/attention-mla'
import { concat, keep, type Precision, type Tensor } from '@moe/core'
import { type CachedPass, CachedPasses } from './cached-passes.ts'
import type { DeepSeek } from './model.ts'
import { scoresOf } from './sampling.ts'

export interface DrafterOptions extends Pick<CacheOptions, 'capacity' | 'dtype'> {
  readonly precision: Precision
}

type Draft = {
  /** What the next depth continues from, `[1, n, D]`. */
  readonly next: Tensor
  /** The token after the last position, `i32 [1, 1, 1]`. */
  readonly best: Tensor
}

/** An MTP module with what it has seen. */
interface Depth {
  readonly cache: LatentCache
  readonly passes: CachedPasses<Draft>
  /** Hidden states of the depth before at positions that the cache does not hold yet, `[1, n, D]`. */
  waiting: Tensor | null
}

/**
 * Drafts one token per depth. Module k runs over position i with the hidden state of depth k - 1 there and token i + k; positions whose token
 * i + k is itself only drafted are run again once it is known, so each module keeps the hidden states it still needs.
 */
export class Drafter {
  readonly #model: DeepSeek
  readonly #precision: Precision
  readonly #depths: readonly Depth[]

  constructor(model: DeepSeek, depth: number, { precision, ...options }: DrafterOptions) {
    const { config, backend } = model
    this.#model = model
    this.#precision = precision
    const depths: Depth[] = []
    this.#depths = depths
    try {
      while (depths.length < depth) {
        const cache = new LatentCache(config, { layers: 1, backend, ...options })
        depths.push({ cache, passes: new CachedPasses<Draft>(model, cache, precision), waiting: null })
      }
    } catch (error) {
      this.dispose()
      throw error
    }
  }

  /** Positions that all modules have seen. */
  get length(): number {
    return Math.min(...this.#depths.map(({ cache }) => cache.lengths[0]))
  }

  /** Forgets what lies past `length` positions, of which all tokens up to `length + depth` stand: the hidden states of those that follow come next. */
  truncate(length: number): void {
    for (const depth of this.#depths) {
      depth.cache.truncate(length)
      depth.waiting?.dispose()
      depth.waiting = null
    }
  }

  /** From `hidden [1, n, D]`, of which the first `confirmed` positions stand; `tokens` are all tokens that are certain. */
  async draft(hidden: Tensor, confirmed: number, tokens: readonly number[]): Promise<number[]> {
    const drafts: number[] = []
    if (this.#depths.length === 0) return drafts
    const held: Tensor[] = []
    const hold = (fn: () => Tensor) => held[held.push(this.#infer(fn)) - 1]
    try {
      let incoming = hold(() => hidden.narrow(1, 0, confirmed).detach())
      for (const [k, depth] of this.#depths.entries()) {
        const { cache, passes, waiting } = depth
        const last = incoming
        const inputs = waiting === null ? last : hold(() => concat([waiting, last], 1))
        const start = cache.lengths[0]
        const length = inputs.shape[1]
        // Position i is given token i + k + 1; the last ones of deeper modules are drafts of the shallower ones.
        const ahead = Int32Array.from(
          { length },
          (_, i) => tokens[start + i + k + 1] ?? drafts[start + i + k + 1 - tokens.length],
        )
        const { next, best } = passes.run('', this.#pass(k), ahead, { states: inputs })
        held.push(next, best)
        drafts.push((await best.values())[0])
        const certain = Math.max(0, Math.min(length, tokens.length - (start + k + 1)))
        cache.truncate(start + certain)
        // A copy: the next pass of the depth before may write over its results.
        const rest = certain === length ? null : this.#infer(() => inputs.narrow(1, certain, length).mul(1))
        waiting?.dispose()
        depth.waiting = rest
        incoming = next
      }
      return drafts
    } finally {
      for (const tensor of held) tensor.dispose()
    }
  }

  #pass(k: number): CachedPass<Draft> {
    const module = this.#model.mtp[k]
    const { cache } = this.#depths[k]
    return (ids, states) => {
      const next = module.normalize(module.forward(states as Tensor, ids, { cache, layer: 0 }))
      const length = ids.shape[1]
      cache.advance(length)
      return { next, best: scoresOf(module.score(next.narrow(1, length - 1, length)), {}) }
    }
  }

  #infer<T>(fn: () => T): T {
    return keep(this.#model.infer(fn, { precision: this.#precision }))
  }

  dispose(): void {
    for (const { cache, passes, waiting } of this.#depths) {
      passes.dispose()
      cache.dispose()
      waiting?.dispose()
    }
  }
}
