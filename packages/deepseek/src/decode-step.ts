/** @file New tokens through the main model over a cache. Short runs are recorded once and replayed, where the backend can. */
import { type KvCache, LatentCache } from '@moe/attention-mla'
import { fromHost, type Graph, keep, namedParameters, type Parameter, type Precision, type Tensor } from '@moe/core'
import type { DeepSeek } from './model.ts'
import { type SamplingOptions, type Scores, scoresOf } from './sampling.ts'

/** Longest run that is recorded. Attention over it is absorbed, so that no shape depends on how much the cache holds. */
const longestRecorded = 8

interface States {
  /** Hidden states of the new tokens, `[1, n, D]`. */
  readonly hidden: Tensor
  /** Of the last `wanted` of them: `scoresOf` the logits. */
  readonly scores: Tensor
}

export interface DecodeOptions {
  readonly precision: Precision
  readonly sampling: SamplingOptions
}

interface Recorded {
  readonly ids: Tensor
  readonly graph: Graph<States>
}

/** The passes of one generation. */
export class DecodeStep {
  readonly #model: DeepSeek
  readonly #cache: KvCache
  readonly #options: DecodeOptions
  /** By the numbers of new tokens and of wanted scores; null after the first such run, which makes the tables that a recording needs. */
  readonly #recorded = new Map<string, Recorded | null>()
  readonly #parameters: readonly Parameter[]
  /** What the graphs hold on to: with other weights or another memory of the cache they are void. */
  #versions: readonly number[] = []
  #capacity = 0

  constructor(model: DeepSeek, cache: KvCache, options: DecodeOptions) {
    this.#model = model
    this.#cache = cache
    this.#options = options
    this.#parameters = namedParameters(model).map(({ parameter }) => parameter)
  }

  /**
   * Adds tokens to the cache; gives their hidden states, which the caller frees before the next run (it may overwrite them), and what follows the last
   * `wanted` of them.
   */
  async run(ids: readonly number[], wanted: number): Promise<{ hidden: Tensor; rows: Scores[] }> {
    const { hidden, scores } = this.#launch(Int32Array.from(ids), wanted)
    const values = await scores.values()
    scores.dispose()
    if (!(values instanceof Float32Array)) return { hidden, rows: Array.from(values) }
    const size = values.length / wanted
    return { hidden, rows: Array.from({ length: wanted }, (_, i) => values.subarray(i * size, (i + 1) * size)) }
  }

  #launch(ids: Int32Array<ArrayBuffer>, wanted: number): States {
    const { backend } = this.#model
    const cache = this.#cache
    const upload = () => fromHost(ids, [1, ids.length], 'i32', backend)
    const recordable = ids.length <= longestRecorded && cache instanceof LatentCache
    if (!backend.capture || !recordable) return keep(this.#infer(() => this.#pass(upload(), wanted)))
    cache.reserve(ids.length)
    this.#check()
    const key = `${ids.length} ${wanted}`
    let recorded = this.#recorded.get(key)
    if (recorded === undefined) {
      this.#recorded.set(key, null)
      return keep(this.#infer(() => this.#pass(upload(), wanted)))
    }
    const before = cache.lengths.slice()
    if (recorded === null) {
      const inputs = keep(upload())
      cache.next(ids.length)
      const graph = backend.capture(() => keep(this.#infer(() => this.#pass(inputs, wanted))))
      recorded = { ids: inputs, graph }
      this.#recorded.set(key, recorded)
      cache.truncate(before)
    }
    backend.write?.(recorded.ids, ids)
    cache.next(ids.length)
    recorded.graph.replay()
    cache.advance(ids.length)
    const { hidden, scores } = recorded.graph.result
    return keep(this.#infer(() => ({ hidden: hidden.detach(), scores: scores.detach() })))
  }

  #infer<T>(fn: () => T): T {
    return this.#model.infer(fn, this.#options)
  }

  #pass(ids: Tensor, wanted: number): States {
    const hidden = this.#model.hidden(ids, { cache: this.#cache })
    const length = ids.shape[1]
    const logits = this.#model.lm_head.forward(hidden.narrow(1, length - wanted, length))
    return { hidden, scores: scoresOf(logits, this.#options.sampling) }
  }

  /** Forgets what was recorded over other memory than there is now. */
  #check(): void {
    const { capacity } = this.#cache
    if (capacity === this.#capacity && this.#parameters.every(({ version }, i) => version === this.#versions[i])) return
    this.dispose()
    this.#versions = this.#parameters.map(({ version }) => version)
    this.#capacity = capacity
  }

  dispose(): void {
    for (const recorded of this.#recorded.values()) {
      if (recorded === null) continue
      recorded.ids.dispose()
      recorded.graph.result.hidden.dispose()
      recorded.graph.result.scores.dispose()
      recorded.graph.dispose()
    }
    this.#recorded.clear()
  }
}
