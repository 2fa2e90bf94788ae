/** @file Expert loads: counted on the device during training, read once per step, judged on the host. */
import { isRecomputing, keep, MoeError, noGrad, scatterAddRows, scope, type Tensor } from '@moe/core'

/**
 * Sums the loads of all micro-batches of a step. Counts exactly once: not in a recomputed forward pass, and only when the layer is told
 * that it trains.
 */
export class LoadCounter {
  #total: Tensor | null = null

  /** Adds `counts i32 [E]`. */
  add(counts: Tensor): void {
    if (isRecomputing()) return
    const before = this.#total
    this.#total = keep(before === null ? counts.detach() : scope(() => before.add(counts)))
    before?.dispose()
  }

  /** The loads so far, `i32 [E]`, or null when nothing was counted. They stay the counter's. */
  get total(): Tensor | null {
    return this.#total
  }

  /** Starts the next step. */
  reset(): void {
    this.#total?.dispose()
    this.#total = null
  }
}

/** Loads `i32 [E]` of the choices `indices i32 [N, K]` of the tokens whose `mask f32 [N]` is 1. */
export function maskedCounts(indices: Tensor, mask: Tensor, experts: number): Tensor {
  const [tokens, topK] = indices.shape
  return noGrad(() =>
    scope(() => {
      const counted = mask.reshape([tokens, 1]).expand([tokens, topK])
      return scatterAddRows(indices.reshape([tokens * topK]), counted.reshape([tokens * topK]), experts).cast('i32')
    }),
  )
}

/** What the experts of a layer were given in a step, all micro-batches and ranks: what a model tells of itself, for logs. */
export interface LayerLoad {
  /** Name of the layer. */
  readonly name: string
  /** Choices of each expert `[E]`, before any is dropped. */
  readonly load: ArrayLike<number>
  /** How many of these choices were dropped, where the layer drops. */
  readonly dropped?: number
  /** Groups of neighbouring experts that its gate knows. Default 1. */
  readonly groups?: number
  /** Selection bias `[E]` after the step, on the device. */
  readonly bias?: Tensor
}

/** How evenly a layer's experts are loaded. */
export interface LoadSummary {
  /** (largest - mean) / mean: 0 when balanced, E/K - 1 when collapsed onto K experts. */
  readonly maxVio: number
  /** Standard deviation over mean. */
  readonly variation: number
  /** Entropy of the load over that of the uniform one: 1 when balanced. */
  readonly entropy: number
  /** Experts without a single token. */
  readonly dead: readonly number[]
  /** Experts with more than twice the mean. */
  readonly hot: readonly number[]
}

/** Loads are on the device until they are read. @throws MoeError E_ATTR */
export function needNumbers(op: string, load: ArrayLike<number>): void {
  const fix = 'pass what was read: await layer.load.values()'
  if (typeof load?.length !== 'number' || typeof load === 'string') {
    const problem = `the loads are ${load === undefined || load === null ? load : 'no list of numbers'}`
    throw new MoeError({ code: 'E_ATTR', op, problem, fix })
  }
  for (let i = 0; i < load.length; i++) {
    if (Number.isFinite(load[i]) && load[i] >= 0) continue
    throw new MoeError({ code: 'E_ATTR', op, problem: `the load of expert ${i} is ${JSON.stringify(load[i])}`, fix })
  }
}

/** Judges the loads of one layer. @throws MoeError E_ATTR for loads that have not been read, or are no numbers from 0 */
export function summarizeLoad(load: ArrayLike<number>): LoadSummary {
  needNumbers('summarizeLoad', load)
  const loads = Array.from(load)
  const total = loads.reduce((sum, n) => sum + n, 0)
  const mean = total / loads.length
  const indices = loads.map((_, i) => i)
  if (total === 0) return { maxVio: 0, variation: 0, entropy: 1, dead: indices, hot: [] }
  const variance = loads.reduce((sum, n) => sum + (n - mean) ** 2, 0) / loads.length
  const entropy = loads.reduce((sum, n) => (n > 0 ? sum - (n / total) * Math.log(n / total) : sum), 0)
  return {
    maxVio: (Math.max(...loads) - mean) / mean,
    variation: Math.sqrt(variance) / mean,
    entropy: loads.length > 1 ? entropy / Math.log(loads.length) : 1,
    dead: indices.filter(i => loads[i] === 0),
    hot: indices.filter(i => loads[i] > 2 * mean),
  }
}
