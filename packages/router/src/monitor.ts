/** @file Monitors the loads of all layers over many steps: imbalance, dead experts, and routing collapse. */
import { checkOptions, MoeError, shown } from '@moe/core'
import { type LoadSummary, needNumbers, summarizeLoad } from './load.ts'

/** Options of a `LoadMonitor`. */
export interface LoadMonitorOptions {
  /** K, the number of experts per token: a collapsed layer uses about that many. */
  readonly topK: number
  /** Number of groups of consecutive experts whose share of the load is reported. Default 1. */
  readonly groups?: number | undefined
  /** Number of steps in the window; older ones are dropped. Default 100. */
  readonly window?: number | undefined
}

/**
 * Verdict on a layer.
 * - `collapsed`: the layer uses hardly more experts than one token does, or more than half of its experts got no token
 *   in the whole window.
 * - `uneven`: the busiest expert has more than twice the mean load over the window.
 * - `balanced`: neither.
 */
export type Verdict = 'balanced' | 'uneven' | 'collapsed'

/** Loads of a layer over the window. */
export interface LayerReport {
  /** The name under which it was recorded. */
  readonly layer: string
  /** Number of steps in the window. */
  readonly steps: number
  /** Tokens times K in the window. */
  readonly total: number
  /** MaxVio of single steps, averaged over the window: the imbalance that devices experience. */
  readonly batchMaxVio: number
  /** MaxVio and other statistics of the loads summed over the window: the imbalance of what experts are trained on. */
  readonly global: LoadSummary
  /** exp(entropy) of the summed loads: E if balanced, K if collapsed onto K experts. */
  readonly effectiveExperts: number
  /** Share of each group; the sum is 1. */
  readonly groupShare: readonly number[]
  /** Smallest and largest selection bias at the last step for which biases were recorded, or null. */
  readonly bias: { readonly min: number; readonly max: number } | null
  /** Overall verdict on the window. */
  readonly verdict: Verdict
}

/** One step of one layer. */
interface Entry {
  readonly load: Float64Array
  readonly maxVio: number
}

/**
 * Stores the loads of recent steps for each layer. Record the training loads, or those of a whole validation set for
 * the global MaxVio of the papers.
 */
export class LoadMonitor {
  readonly #options: Required<LoadMonitorOptions>
  readonly #layers = new Map<string, { entries: Entry[]; bias: LayerReport['bias'] }>()

  /** @throws MoeError E_CONFIG if topK, groups or window is not a positive integer */
  constructor(options: LoadMonitorOptions) {
    checkOptions('LoadMonitor', options, { topK: true, groups: true, window: true })
    this.#options = { groups: 1, window: 100, ...options }
    const { topK, groups, window } = this.#options
    for (const [name, size] of Object.entries({ topK, groups, window })) {
      if (Number.isInteger(size) && size >= 1) continue
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'LoadMonitor',
        problem: `${name} = ${shown(size)} is not a positive integer`,
      })
    }
  }

  /**
   * Records the loads `[E]` of one layer in one step, and optionally its selection biases.
   * @throws MoeError E_SHAPE if the number of experts is not divisible by the groups, or differs from earlier steps of
   * the layer
   */
  record(layer: string, load: ArrayLike<number>, bias?: ArrayLike<number>): void {
    needNumbers('LoadMonitor.record', load)
    this.#check(layer, load.length)
    let known = this.#layers.get(layer)
    if (known === undefined) {
      known = { entries: [], bias: null }
      this.#layers.set(layer, known)
    }
    known.entries.push({ load: Float64Array.from(load), maxVio: summarizeLoad(load).maxVio })
    if (known.entries.length > this.#options.window) known.entries.shift()
    if (bias !== undefined) {
      const values = Array.from(bias)
      known.bias = { min: Math.min(...values), max: Math.max(...values) }
    }
  }

  #check(layer: string, experts: number): void {
    const { groups } = this.#options
    const before = this.#layers.get(layer)?.entries[0].load.length ?? experts
    if (experts === before && experts > 0 && experts % groups === 0) return
    const problem =
      experts === before
        ? `the ${experts} experts of ${JSON.stringify(layer)} are not divisible by ${groups} groups`
        : `${JSON.stringify(layer)} had ${before} experts before, now ${experts}`
    throw new MoeError({ code: 'E_SHAPE', op: 'LoadMonitor.record', problem })
  }

  /** Returns one report per layer, in the order in which they were first recorded. */
  report(): LayerReport[] {
    return Array.from(this.#layers, ([layer, { entries, bias }]) => this.#judge(layer, entries, bias))
  }

  /** The worst verdict over all layers. */
  get verdict(): Verdict {
    const verdicts = this.report().map(({ verdict }) => verdict)
    return (['collapsed', 'uneven'] as const).find(verdict => verdicts.includes(verdict)) ?? 'balanced'
  }

  /** Removes all recorded loads. */
  reset(): void {
    this.#layers.clear()
  }

  #judge(layer: string, entries: readonly Entry[], bias: LayerReport['bias']): LayerReport {
    const { topK, groups } = this.#options
    const sums = new Float64Array(entries[0].load.length)
    for (const { load } of entries) for (const [i, n] of load.entries()) sums[i] += n
    const global = summarizeLoad(sums)
    const total = sums.reduce((a, b) => a + b, 0)
    const effectiveExperts = sums.length ** global.entropy
    const size = sums.length / groups
    const groupShare = Array.from({ length: groups }, (_, g) =>
      total === 0 ? 0 : sums.subarray(g * size, (g + 1) * size).reduce((a, b) => a + b, 0) / total,
    )
    const spare = sums.length - topK
    const collapsed =
      total > 0 && spare > 0 && (effectiveExperts < topK + 0.1 * spare || global.dead.length > sums.length / 2)
    return {
      layer,
      steps: entries.length,
      total,
      batchMaxVio: entries.reduce((sum, { maxVio }) => sum + maxVio, 0) / entries.length,
      global,
      effectiveExperts,
      groupShare,
      bias,
      verdict: collapsed ? 'collapsed' : global.maxVio > 1 ? 'uneven' : 'balanced',
    }
  }
}
