/** @file New tokens through the main model over a cache. Short runs are recorded once and replayed, where the backend can. */
import { type KvCache, LatentCache } from '@moe/attention-mla'
import { fromHost, type Graph, keep, namedParameters, type Parameter, type Tensor } from '@moe/core'
import type { DeepSeek } from './model.ts'

/** Longest run that is recorded. Attention over it is absorbed, so that no shape depends on how much the cache holds. */
const longestRecorded = 8

interface States {
  /** Hidden states of the new tokens, `[1, n, D]`. */
  readonly hidden: Tensor
  /** Of the last `wanted` of them, `[1, wanted, V]`. */
  readonly logits: Tensor
}

interface Recorded {
  readonly ids: Tensor
  readonly graph: Graph<States>
}

/** The passes of one generation. */
export class DecodeStep {
  readonly #model: DeepSeek
  readonly #cache: KvCache
  /** By the numbers of new tokens and of wanted logits; null after the first such run, which makes the tables that a recording needs. */
  readonly #recorded = new Map<string, Recorded | null>()
  readonly #parameters: readonly Parameter[]
  /** What the graphs hold on to: with other weights or another memory of the cache they are void. */
  #versions: readonly number[] = []
  #capacity = 0

  constructor(model: DeepSeek, cache: KvCache) {
    this.#model = model
    this.#cache = cache
    this.#parameters = namedParameters(model).map(({ parameter }) => parameter)
  }

  /**
   * Adds tokens to the cache; gives their hidden states, which the caller frees before the next run (it may overwrite them), and the logits of the last
   * `wanted` of them.
   */
  async run(ids: readonly number[], wanted: number): Promise<{ hidden: Tensor; rows: Float32Array[] }> {
    const { hidden, logits } = this.#launch(Int32Array.from(ids), wanted)
    const values = (await logits.values()) as Float32Array
    logits.dispose()
    const { vocab_size: size } = this.#model.config
    return { hidden, rows: Array.from({ length: wanted }, (_, i) => values.subarray(i * size, (i + 1) * size)) }
  }

  #launch(ids: Int32Array<ArrayBuffer>, wanted: number): States {
    const model = this.#model
    const { backend } = model
    const cache = this.#cache
    const upload = () => fromHost(ids, [1, ids.length], 'i32', backend)
    const recordable = ids.length <= longestRecorded && cache instanceof LatentCache
    if (!backend.capture || !recordable) return keep(model.infer(() => this.#pass(upload(), wanted)))
    cache.reserve(ids.length)
    this.#check()
    const key = `${ids.length} ${wanted}`
    let recorded = this.#recorded.get(key)
    if (recorded === undefined) {
      this.#recorded.set(key, null)
      return keep(model.infer(() => this.#pass(upload(), wanted)))
    }
    const before = cache.lengths.slice()
    if (recorded === null) {
      const inputs = keep(upload())
      cache.next(ids.length)
      const graph = backend.capture(() => keep(model.infer(() => this.#pass(inputs, wanted))))
      recorded = { ids: inputs, graph }
      this.#recorded.set(key, recorded)
      cache.truncate(before)
    }
    backend.write?.(recorded.ids, ids)
    cache.next(ids.length)
    recorded.graph.replay()
    cache.advance(ids.length)
    const { hidden, logits } = recorded.graph.result
    return keep(model.infer(() => ({ hidden: hidden.detach(), logits: logits.detach() })))
  }

  #pass(ids: Tensor, wanted: number): States {
    const hidden = this.#model.hidden(ids, { cache: this.#cache })
    const length = ids.shape[1]
    return { hidden, logits: this.#model.lm_head.forward(hidden.narrow(1, length - wanted, length)) }
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
      recorded.graph.result.logits.dispose()
      recorded.graph.dispose()
    }
    this.#recorded.clear()
  }
}
