/** @file Forward passes that append tokens to a cache. Short ones are captured as a graph and replayed, if the backend supports it. */
import { MultiHeadLatentAttention, type SequenceCache } from '@moe/attention-mla'
import { fromHost, type Graph, isMoeError, keep, type Precision, setRows, type Tensor } from '@moe/core'
import { hiddenStates } from './hidden-states.ts'
import type { Network } from './network.ts'
import { WeightWatch } from './weight-watch.ts'

/** Maximum tokens per sequence of a recorded pass. Attention over so few is absorbed, so that no shape depends on the length of the cache. */
const longestRecorded = 8

/** Maximum tokens of a recorded pass in total. Each batch size has its own graph with memory for its logits, and with many sequences, launches take little of the time. */
const mostRecorded = 32

/** Inputs of a pass besides tokens. */
export interface PassInputs {
  /** `[B, n, D]`. */
  readonly states?: Tensor
  /** One number per sequence, `[B]`. */
  readonly numbers?: Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer>
}

/** A pass that appends tokens to the cache. */
export interface CachedPass<Out> {
  /** 0 for the main model, k for its k-th MTP module. */
  readonly depth: number
  /** Computes the results, including `hidden` itself, from the hidden states after the norm, `[B, n, D]`. They may depend only on the arguments and on weights. */
  readonly finish: (hidden: Tensor, numbers: Tensor | undefined) => Out
}

interface Recorded<Out> {
  readonly ids: Tensor
  states: Tensor | undefined
  readonly numbers: Tensor | undefined
  /** The constant 0, `i32 [1]`. */
  readonly first: Tensor
  readonly graph: Graph<Out>
}

/** The passes of one session over one cache. */
export class CachedPasses<Out extends Readonly<Record<string, Tensor>>> {
  readonly #model: Network
  readonly #cache: SequenceCache
  readonly #precision: Precision
  #records: boolean
  /** By kind and number of tokens. Null after the first such pass, which creates the tables that a recording needs. */
  readonly #recorded = new Map<string, Recorded<Out> | null>()
  /** Graphs become invalid with other weights or another cache layout. */
  readonly #weights: WeightWatch
  #layout = ''

  constructor(model: Network, cache: SequenceCache, precision: Precision) {
    this.#model = model
    this.#cache = cache
    this.#precision = precision
    this.#records =
      model.backend.capture !== undefined && model.decoder[0].self_attn instanceof MultiHeadLatentAttention
    this.#weights = new WeightWatch(model)
  }

  /** Runs a pass. The caller must dispose of the result before the next pass, which may overwrite it. All passes of one kind and length must consist of the same ops. */
  async run(kind: string, pass: CachedPass<Out>, ids: Int32Array<ArrayBuffer>, inputs: PassInputs = {}): Promise<Out> {
    const cache = this.#cache
    const time = ids.length / cache.batch
    const remote = this.#model.remoteExperts !== null
    if (remote || !this.#records || time > longestRecorded || ids.length > mostRecorded)
      return this.#opByOp(pass, ids, inputs)
    cache.reserve(time)
    this.#check()
    const key = `${kind} ${time}`
    const known = this.#recorded.get(key)
    if (known === undefined) {
      this.#recorded.set(key, null)
      return this.#opByOp(pass, ids, inputs)
    }
    const recorded = known ?? this.#record(pass, ids, inputs)
    if (recorded === null) return this.#opByOp(pass, ids, inputs)
    this.#recorded.set(key, recorded)
    const { backend } = this.#model
    backend.write?.(recorded.ids, ids)
    if (recorded.numbers && inputs.numbers) backend.write?.(recorded.numbers, inputs.numbers)
    if (inputs.states) {
      recorded.states = this.#copyInto(recorded.states as Tensor, inputs.states, recorded.first)
    }
    cache.next(time)
    recorded.graph.replay()
    cache.advance(time)
    const results = Object.entries(recorded.graph.result)
    return keep(this.#infer(() => Object.fromEntries(results.map(([name, x]) => [name, x.detach()])) as unknown as Out))
  }

  async #opByOp(pass: CachedPass<Out>, ids: Int32Array<ArrayBuffer>, inputs: PassInputs): Promise<Out> {
    const cache = this.#cache
    const { states, numbers } = inputs
    const tokens = { depth: pass.depth, ids, batch: cache.batch, states, cache }
    const hidden = await hiddenStates(this.#model, tokens, this.#precision)
    try {
      return keep(this.#infer(() => pass.finish(hidden, this.#uploadNumbers(numbers))))
    } catch (error) {
      hidden.dispose()
      throw error
    }
  }

  /** Returns null if there is not enough memory for a graph. */
  #record(pass: CachedPass<Out>, ids: Int32Array<ArrayBuffer>, like: PassInputs): Recorded<Out> | null {
    const { backend } = this.#model
    const cache = this.#cache
    const before = cache.lengths.slice()
    const inputs: Tensor[] = []
    const own = (tensor: Tensor) => {
      inputs.push(keep(tensor))
      return tensor
    }
    try {
      const device = own(this.#upload(ids))
      const first = own(fromHost(Int32Array.of(0), [1], 'i32', backend))
      const { states: given } = like
      const states = given && own(this.#infer(() => given.mul(1)))
      const numbers = like.numbers && own(this.#uploadNumbers(like.numbers) as Tensor)
      cache.next(ids.length / cache.batch)
      const hidden = () => this.#model.hiddenAt({ depth: pass.depth, ids: device, states, cache })
      const capture = () => keep(this.#infer(() => pass.finish(hidden(), numbers)))
      const graph = (backend as Required<typeof backend>).capture(capture)
      return { ids: device, states, numbers, first, graph }
    } catch (error) {
      for (const tensor of inputs) tensor.dispose()
      if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
      this.#records = false
      return null
    } finally {
      cache.truncate(before)
    }
  }

  /** Overwrites a tensor that has no other references. */
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

  #upload(ids: Int32Array<ArrayBuffer>): Tensor {
    const { batch } = this.#cache
    return fromHost(ids, [batch, ids.length / batch], 'i32', this.#model.backend)
  }

  #uploadNumbers(numbers: PassInputs['numbers']): Tensor | undefined {
    const dtype = numbers instanceof Int32Array ? 'i32' : 'f32'
    return numbers && fromHost(numbers, [numbers.length], dtype, this.#model.backend)
  }

  #infer<T>(fn: () => T): T {
    return this.#model.infer(fn, { precision: this.#precision })
  }

  /** Discards recordings if weights or cache memory have changed. */
  #check(): void {
    const { layout } = this.#cache
    if (!this.#weights.changed() && layout === this.#layout) return
    this.dispose()
    this.#layout = layout
  }

  dispose(): void {
    for (const recorded of this.#recorded.values()) {
      if (recorded === null) continue
      const { ids, states, numbers, first, graph } = recorded
      for (const tensor of [ids, states, numbers, first, ...Object.values(graph.result)]) tensor?.dispose()
      graph.dispose()
    }
    this.#recorded.clear()
  }
}
