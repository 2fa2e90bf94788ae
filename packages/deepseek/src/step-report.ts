/** @file Collects the expert loads of a step over all layers and ranks. */
import { keep, type Tensor, zeros } from '@moe/core'
import { type LayerLoad, type LoadMonitor, type LoadSummary, MoELayer, summarizeLoad } from '@moe/router'
import type { DecoderLayer } from './decoder-layer.ts'

/** Counts of a MoE layer in a step, on their way to the host: loads `[E]`, and the number of expert choices that were not dropped, `[1]`. */
export interface StepCounts {
  readonly load: Promise<ArrayLike<number>> | undefined
  readonly kept?: Promise<ArrayLike<number>> | undefined
}

/** Returns the MoE layers of decoder layers, with their names in checkpoints. */
export function namedMoeLayers(blocks: readonly DecoderLayer[]): Array<readonly [name: string, layer: MoELayer]> {
  return blocks.flatMap(({ mlp }, i) => (mlp instanceof MoELayer ? [[`layers.${i}`, mlp] as const] : []))
}

/**
 * Sums loads over all ranks, and with token dropping also the choices that were kept. A layer without counts, for example in a stage of another rank, adds zeros.
 * @returns `i32 [E]` of each layer, then with dropping `[1]` of each. The caller must dispose of them.
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

/** Passes the loads of layers that have processed tokens to the monitor, and returns them with metrics. */
export async function reportLoads(
  layers: ReadonlyArray<readonly [name: string, layer: MoELayer]>,
  counts: readonly StepCounts[],
  biases: ReadonlyArray<Promise<ArrayLike<number>> | null | undefined>,
  options: { readonly monitor: LoadMonitor | null; readonly groups: number },
): Promise<{ readonly layerLoads: LayerLoad[]; readonly metrics: Record<string, number> }> {
  const { monitor, groups } = options
  const summaries: LoadSummary[] = []
  const layerLoads: LayerLoad[] = []
  // Read all at once: if the device is lost, every read fails, and each rejection must be handled.
  const reads = await Promise.all(counts.map(({ load, kept }, i) => Promise.all([load, biases[i], kept])))
  for (const [i, [values, bias, kept]] of reads.entries()) {
    const load = Array.from(values ?? [])
    const choices = load.reduce((sum, count) => sum + count, 0)
    // The layer has processed no tokens.
    if (choices === 0) continue
    const [name, { gate }] = layers[i]
    monitor?.record(name, load, bias ?? undefined)
    summaries.push(summarizeLoad(load))
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
