/** @file Watching the loads of all layers over many steps: what is uneven, what is dead, and whether the routing has collapsed. */
import { checkOptions, MoeError, shown } from '@moe/core'
import { type LoadSummary, needNumbers, summarizeLoad } from './load.ts'

/** What is watched, and for how long. */
export interface LoadMonitorOptions {
  /** K: tells how many experts a collapsed layer may still use. */
  readonly topK: number
  /** Groups of neighbouring experts whose share of the load is reported. Default 1. */
  readonly groups?: number
  /** Steps that the window holds; older ones are forgotten. Default 100. */
  readonly window?: number
}

/**
 * `collapsed`: the layer uses hardly more experts than one token does, or more than half of them got no token in the whole window.
 * `uneven`: the busiest expert has more than twice the mean over the window. `balanced`: neither.
 */
export type Verdict = 'balanced' | 'uneven' | 'collapsed'

/** Loads of a layer over the steps of the window. */
export interface LayerReport {
  /** The name that it was recorded under. */
  readonly layer: string
  /** Steps in the window. */
  readonly steps: number
  /** Tokens times K in the window. */
  readonly total: number
  /** MaxVio of each single step, mean over the window: what a device feels. */
  readonly batchMaxVio: number
  /** MaxVio and the rest of the loads summed over the window: what the experts learn from. */
  readonly global: LoadSummary
  /** exp(entropy) of the summed loads: E when balanced, K when collapsed onto K experts. */
  readonly effectiveExperts: number
  /** Share of each group, summing to 1. */
  readonly groupShare: readonly number[]
  /** Smallest and largest selection bias at the last step, when they were recorded. */
  readonly bias: { readonly min: number; readonly max: number } | null
  /** The window in one word. */
  readonly verdict: Verdict
}

/** One step of one layer. */
interface Entry {
  readonly load: Float64Array
  readonly maxVio: number
}

/** Keeps the loads of the last steps by layer. Give it the training loads, or those of a whole validation set for the global MaxVio of the papers. */
export class LoadMonitor {
  readonly #options: Required<LoadMonitorOptions>
  readonly #layers = new Map<string, { entries: Entry[]; bias: LayerReport['bias'] }>()

  /** @throws MoeError E_CONFIG for a topK, groups or a window that are no positive integers. */
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
   * Records the loads `[E]` of one step of one layer and, if there are any, its selection biases.
   * @throws MoeError E_SHAPE for a number of experts that the groups cannot share, or other than that of the layer's steps before.
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
        ? `${groups} groups cannot share the ${experts} experts of ${JSON.stringify(layer)} evenly`
        : `${JSON.stringify(layer)} had ${before} experts and has ${experts} now`
    throw new MoeError({ code: 'E_SHAPE', op: 'LoadMonitor.record', problem })
  }

  /** One report per layer, in the order in which they were first recorded. */
  report(): LayerReport[] {
    return Array.from(this.#layers, ([layer, { entries, bias }]) => this.#judge(layer, entries, bias))
  }

  /** The worst verdict over all layers. */
  get verdict(): Verdict {
    const verdicts = this.report().map(({ verdict }) => verdict)
    return (['collapsed', 'uneven'] as const).find(verdict => verdicts.includes(verdict)) ?? 'balanced'
  }

  /** Forgets everything. */
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
