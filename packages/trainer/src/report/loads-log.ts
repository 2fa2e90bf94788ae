/** @file `loads.jsonl`: the expert loads of each layer, one line every few steps. */
import type { LayerLoads, LoadsEvent, TrainListener } from '../events.ts'
import type { LayerLoad } from '../model.ts'
import { LogFile } from './log-file.ts'
import { readLines } from './metrics-log.ts'

/** A line of `loads.jsonl`: a `loads` event without its type. */
export type LoadsLine = Omit<LoadsEvent, 'type'>

interface LayerSum {
  readonly load: Float64Array
  steps: number
  maxVio: number
  dropped: number
  latest: LayerLoad
}

/** Sums loads over steps. */
export class LoadSums {
  #steps = 0
  readonly #sums = new Map<string, LayerSum>()

  /** Adds the loads of a step. */
  add(layers: readonly LayerLoad[] = []): void {
    this.#steps++
    for (const latest of layers) {
      const sum = this.#sums.get(latest.name) ?? emptySum(latest)
      for (let i = 0; i < sum.load.length; i++) sum.load[i] += latest.load[i]
      sum.steps++
      sum.maxVio += maxVio(latest.load)
      sum.dropped += latest.dropped ?? 0
      sum.latest = latest
      this.#sums.set(latest.name, sum)
    }
  }

  /** Returns and resets the sums, with the current biases unless they are not to be read. Null if there are no sums. */
  async take(step: number, options: { biases: boolean }): Promise<LoadsEvent | null> {
    const sums = [...this.#sums.values()]
    const steps = this.#steps
    this.#sums.clear()
    this.#steps = 0
    if (sums.length === 0) return null
    const biases = await Promise.all(sums.map(({ latest }) => (options.biases ? latest.bias?.values() : undefined)))
    const layers = sums.map(({ load, steps, maxVio, dropped, latest }, i): LayerLoads => {
      const { name, groups = 1 } = latest
      const bias = biases[i]
      return {
        name,
        ...(groups > 1 && { groups }),
        load: Array.from(load),
        stepMaxVio: digits(maxVio / steps),
        ...(latest.dropped !== undefined && { dropped }),
        ...(bias && { bias: Array.from(bias, digits) }),
      }
    })
    return { type: 'loads', step, steps, layers }
  }
}

const emptySum = (latest: LayerLoad): LayerSum => {
  return { load: new Float64Array(latest.load.length), steps: 0, maxVio: 0, dropped: 0, latest }
}

/** MaxVio: (largest - mean) / mean; 0 if all loads are 0. */
export function maxVio(load: ArrayLike<number>): number {
  let [largest, sum] = [0, 0]
  for (let i = 0; i < load.length; i++) {
    largest = Math.max(largest, load[i])
    sum += load[i]
  }
  return sum === 0 ? 0 : (largest * load.length) / sum - 1
}

const digits = (value: number) => Number(value.toPrecision(6))

/** A listener that writes loads. The file is created by the first `loads` event. */
export function loadsLog(path: string): TrainListener {
  const file = new LogFile(path)
  return event => {
    if (event.type !== 'loads') return
    const { type, ...line } = event
    file.line(line)
    file.flush()
  }
}

/** Returns the lines of a `loads.jsonl` up to a step. Like `readMetrics`, it stops at the first unreadable line. */
export function readLoads(path: string | URL, upToStep?: number): LoadsLine[] {
  return readLines<LoadsLine>('readLoads', path, upToStep)
}
