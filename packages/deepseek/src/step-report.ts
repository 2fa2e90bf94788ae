/** @file What a step tells of its experts: loads of all layers, over all ranks. */
import { keep, type Tensor, zeros } from '@moe/core'
import { type LayerLoad, type LoadMonitor, type LoadSummary, type MoELayer, summarizeLoad } from '@moe/router'

/** Of a layer with experts in a step, on their way to the host: loads `[E]`, and how many of these choices were not dropped, `[1]`. */
export interface StepCounts {
  readonly load: Promise<ArrayLike<number>> | undefined
  readonly kept?: Promise<ArrayLike<number>> | undefined
}

/**
 * Loads of the layers over all ranks, and with dropping behind them what each has kept. A layer that has not counted, as in a stage of another rank, has zeros to add.
 * @returns `i32 [E]` of each layer, then `[1]` of each where tokens are dropped; to be disposed of
 */
export async function sumCounts(
  layers: readonly MoELayer[],
  sum: (counts: readonly Tensor[]) => Promise<Tensor[]>,
  dropping: boolean,
): Promise<Tensor[]> {
  const { backend, shape } = layers[0].gate.weight
  const nothing = [shape[0], 1].map(size => keep(zeros([size], { dtype: 'i32', backend })))
  const loads = layers.map(({ load }) => load ?? nothing[0])
  const kept = dropping ? layers.map(layer => layer.kept ?? nothing[1]) : []
  return sum([...loads, ...kept]).finally(() => {
    for (const zero of nothing) zero.dispose()
  })
}

/** Loads of the layers that tokens have passed through, also to the monitor, and what is worth logging of all. */
export async function reportLoads(
  layers: ReadonlyArray<readonly [name: string, layer: MoELayer]>,
  counts: readonly StepCounts[],
  biases: ReadonlyArray<Promise<ArrayLike<number>> | null | undefined>,
  options: { readonly monitor: LoadMonitor | null; readonly groups: number },
): Promise<{ readonly layerLoads: LayerLoad[]; readonly metrics: Record<string, number> }> {
  const { monitor, groups } = options
  const summaries: LoadSummary[] = []
  const layerLoads: LayerLoad[] = []
  // All at once: where the device is lost, every read fails, and none may be left alone with that.
  const reads = await Promise.all(counts.map(({ load, kept }, i) => Promise.all([load, biases[i], kept])))
  for (const [i, [values, bias, kept]] of reads.entries()) {
    const load = Array.from(values ?? [])
    const choices = load.reduce((sum, count) => sum + count, 0)
    // Nothing has passed through it.
    if (choices === 0) continue
    monitor?.record(`moe ${i}`, load, bias ?? undefined)
    summaries.push(summarizeLoad(load))
    const [name, { gate }] = layers[i]
    layerLoads.push({ name, load, dropped: kept && choices - kept[0], groups, bias: gate.e_score_correction_bias })
  }
  return { layerLoads, metrics: metricsOf(summaries) }
}

function metricsOf(summaries: readonly LoadSummary[]): Record<string, number> {
  if (summaries.length === 0) return {}
  const vio = summaries.map(({ maxVio }) => maxVio)
  return {
    maxVio: vio.reduce((sum, x) => sum + x, 0) / vio.length,
    maxVioWorst: Math.max(...vio),
    deadExperts: summaries.reduce((sum, { dead }) => sum + dead.length, 0),
  }
}
