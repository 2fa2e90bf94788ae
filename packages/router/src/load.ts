/** @file Loads of experts: counted on the device during training, read once per step, and evaluated on the host. */
import { isRecomputing, keep, MoeError, noGrad, scatterAddRows, scope, type Tensor } from '@moe/core'

/** Sums the loads of all micro-batches of a step. A recomputed forward pass is not counted again. */
export class LoadCounter {
  #total: Tensor | null = null

  /** Adds `counts i32 [E]`. */
  add(counts: Tensor): void {
    if (isRecomputing()) return
    const before = this.#total
    this.#total = keep(before === null ? counts.detach() : scope(() => before.add(counts)))
    before?.dispose()
  }

  /** The loads so far, `i32 [E]`, or null if nothing was counted. The tensor belongs to the counter. */
  get total(): Tensor | null {
    return this.#total
  }

  /** Resets the loads for the next step. */
  reset(): void {
    this.#total?.dispose()
    this.#total = null
  }
}

/** Returns the loads `i32 [E]` of the choices `indices i32 [N, K]`, counting tokens whose `mask f32 [N]` is 1. */
export function maskedCounts(indices: Tensor, mask: Tensor, experts: number): Tensor {
  const [tokens, topK] = indices.shape
  return noGrad(() =>
    scope(() => {
      const counted = mask.reshape([tokens, 1]).expand([tokens, topK])
      return scatterAddRows(indices.reshape([tokens * topK]), counted.reshape([tokens * topK]), experts).cast('i32')
    }),
  )
}

/** The loads of a layer in a step, over all micro-batches and ranks. Models report it for logs. */
export interface LayerLoad {
  /** Name of the layer. */
  readonly name: string
  /** Number of choices per expert `[E]`, before dropping. */
  readonly load: ArrayLike<number>
  /** How many of these choices were dropped, if the layer drops. */
  readonly dropped?: number
  /** Number of groups of consecutive experts in its gate. Default 1. */
  readonly groups?: number
  /** Selection bias `[E]` after the step, on the device. */
  readonly bias?: Tensor
}

/** Statistics on how evenly a layer's experts are loaded. */
export interface LoadSummary {
  /** (largest - mean) / mean: 0 if balanced, E/K - 1 if collapsed onto K experts. */
  readonly maxVio: number
  /** Coefficient of variation: standard deviation divided by the mean. */
  readonly variation: number
  /** Entropy of the load relative to that of a uniform one: 1 if balanced. */
  readonly entropy: number
  /** Experts without any tokens. */
  readonly dead: readonly number[]
  /** Experts with more than twice the mean load. */
  readonly hot: readonly number[]
}

/** Checks that loads were read from the device and are valid. @throws MoeError E_ATTR */
export function needNumbers(op: string, load: ArrayLike<number>): void {
  const fix = 'read the loads first: await layer.load.values()'
  if (typeof load?.length !== 'number' || typeof load === 'string') {
    const problem = `the loads are ${load === undefined || load === null ? load : 'not a list of numbers'}`
    throw new MoeError({ code: 'E_ATTR', op, problem, fix })
  }
  for (let i = 0; i < load.length; i++) {
    if (Number.isFinite(load[i]) && load[i] >= 0) continue
    throw new MoeError({ code: 'E_ATTR', op, problem: `the load of expert ${i} is ${JSON.stringify(load[i])}`, fix })
  }
}

/**
 * Computes statistics of the loads of one layer.
 * @throws MoeError E_ATTR for loads that were not read from the device, or are not numbers of at least 0
 */
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
