/** @file Passes that add tokens to a cache. Short ones are recorded once and replayed, where the backend can. */
import { type KvCache, LatentCache } from '@moe/attention-mla'
import {
  fromHost,
  type Graph,
  isMoeError,
  keep,
  namedParameters,
  type Parameter,
  type Precision,
  setRows,
  type Tensor,
} from '@moe/core'
import type { DeepSeek } from './model.ts'

/** Longest run that is recorded. Attention over it is absorbed, so that no shape depends on how much the cache holds. */
const longestRecorded = 8

/** Adds the tokens `ids [1, n]` to the cache. It depends on them, on `states [1, n, D]` if there are any, on weights and cache, and on nothing else that changes. */
export type CachedPass<Out> = (ids: Tensor, states: Tensor | undefined) => Out

interface Recorded<Out> {
  readonly ids: Tensor
  states: Tensor | undefined
  /** The number 0, `i32 [1]`. */
  readonly first: Tensor
  readonly graph: Graph<Out>
}

/** Passes of one session over one cache. */
export class CachedPasses<Out extends Readonly<Record<string, Tensor>>> {
  readonly #model: DeepSeek
  readonly #cache: KvCache
  readonly #precision: Precision
  #records: boolean
  /** By kind and number of tokens; null after the first such run, which makes the tables that a recording needs. */
  readonly #recorded = new Map<string, Recorded<Out> | null>()
  readonly #parameters: readonly Parameter[]
  /** What the graphs hold on to: with other weights or another memory of the cache they are void. */
  #versions: readonly number[] = []
  #capacity = 0

  constructor(model: DeepSeek, cache: KvCache, precision: Precision) {
    this.#model = model
    this.#cache = cache
    this.#precision = precision
    this.#records = model.backend.capture !== undefined && cache instanceof LatentCache
    this.#parameters = namedParameters(model).map(({ parameter }) => parameter)
  }

  /** The result is the caller's, who frees it before the next run: that may overwrite it. Runs of one kind and length have the same ops. */
  run(kind: string, pass: CachedPass<Out>, ids: Int32Array<ArrayBuffer>, states?: Tensor): Out {
    const { backend } = this.#model
    const opByOp = () => keep(this.#infer(() => pass(fromHost(ids, [1, ids.length], 'i32', backend), states)))
    if (!this.#records || ids.length > longestRecorded) return opByOp()
    const cache = this.#cache
    cache.reserve(ids.length)
    this.#check()
    const key = `${kind} ${ids.length}`
    const known = this.#recorded.get(key)
    if (known === undefined) {
      this.#recorded.set(key, null)
      return opByOp()
    }
    const recorded = known ?? this.#record(pass, ids, states)
    if (recorded === null) return opByOp()
    this.#recorded.set(key, recorded)
    backend.write?.(recorded.ids, ids)
    if (states) recorded.states = this.#copyInto(recorded.states as Tensor, states, recorded.first)
    cache.next(ids.length)
    recorded.graph.replay()
    cache.advance(ids.length)
    const results = Object.entries(recorded.graph.result)
    return keep(this.#infer(() => Object.fromEntries(results.map(([name, x]) => [name, x.detach()])) as unknown as Out))
  }

  /** Null where there is no memory for a graph: it cannot wait for what others are about to free. */
  #record(pass: CachedPass<Out>, ids: Int32Array<ArrayBuffer>, like: Tensor | undefined): Recorded<Out> | null {
    const { backend } = this.#model
    const cache = this.#cache
    const before = cache.lengths.slice()
    const inputs: Tensor[] = []
    const own = (tensor: Tensor) => {
      inputs.push(keep(tensor))
      return tensor
    }
    try {
      const device = own(fromHost(ids, [1, ids.length], 'i32', backend))
      const first = own(fromHost(Int32Array.of(0), [1], 'i32', backend))
      const states = like && own(this.#infer(() => like.mul(1)))
      cache.next(ids.length)
      const graph = (backend as Required<typeof backend>).capture(() => keep(this.#infer(() => pass(device, states))))
      return { ids: device, states, first, graph }
    } catch (error) {
      for (const tensor of inputs) tensor.dispose()
      if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
      this.#records = false
      return null
    } finally {
      cache.truncate(before)
    }
  }

  /** Other elements for a tensor that nobody else holds, in its place. */
  #copyInto(to: Tensor, from: Tensor, first: Tensor): Tensor {
    const row = [1, to.size]
    return keep(
      this.#infer(() => {
        const flat = to.reshape(row)
        to.dispose()
        return setRows(flat, first, from.reshape(row), { donate: true }).reshape(from.shape)
      }),
    )
  }

  #infer<T>(fn: () => T): T {
    return this.#model.infer(fn, { precision: this.#precision })
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
      const { ids, states, first, graph } = recorded
      for (const tensor of [ids, states, first, ...Object.values(graph.result)]) tensor?.dispose()
      graph.dispose()
    }
    this.#recorded.clear()
  }
}
