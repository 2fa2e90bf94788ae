/** @file The expert loads of a run, for heat maps. */
import { join } from 'node:path'
import { type Fields, isFields, isNumber } from './json-fields.ts'
import { type StepLine, WatchedLog } from './watched-log.ts'

/** The loads of a layer, as in `loads.jsonl`. */
export interface WatchedLayer {
  readonly name: string
  readonly groups: number
  readonly load: readonly number[]
  readonly stepMaxVio?: number
  readonly dropped?: number
  readonly bias?: readonly number[]
}

/** A line of `loads.jsonl`. */
export interface LoadsAt {
  readonly step: number
  readonly steps: number
  readonly layers: readonly WatchedLayer[]
}

/** A layer over time: one entry per line. */
export type LoadsOver = ReadonlyArray<{ readonly step: number; readonly steps: number } & Omit<WatchedLayer, 'name'>>

export class WatchedLoads {
  readonly #log: WatchedLog
  /** Names of the layers in the last line. */
  #layers: readonly string[] = []

  constructor(folder: string) {
    this.#log = new WatchedLog(join(folder, 'loads.jsonl'))
  }

  /** First and last step with loads, and the layers. Null for a run without experts. */
  get span(): { readonly first: number; readonly last: number; readonly layers: readonly string[] } | null {
    const { span } = this.#log
    return span && { ...span, layers: this.#layers }
  }

  refresh(): Promise<boolean> {
    return this.#log.refresh(
      line => {
        this.#layers = layersOf(line).map(({ name }) => name)
      },
      () => {},
    )
  }

  /** The line that covers a step, or the last line if the step is later. Undefined if there are no lines. */
  async at(step: number): Promise<LoadsAt | undefined> {
    const line = await this.#log.at(step)
    return line && { step: line.step, steps: stepsOf(line), layers: layersOf(line) }
  }

  /** A layer in the lines with steps from `from` to `to`; if there are more than `most`, an even selection. */
  async over(layer: string, { from, to, most }: { from: number; to: number; most: number }): Promise<LoadsOver> {
    const lines = await this.#log.spread(from, to, most)
    return lines.flatMap(line =>
      layersOf(line)
        .filter(({ name }) => name === layer)
        .map(({ name, ...loads }) => ({ step: line.step, steps: stepsOf(line), ...loads })),
    )
  }
}

const stepsOf = ({ steps }: Fields) => (isNumber(steps) ? steps : 1)

const areNumbers = (value: unknown): value is number[] => Array.isArray(value) && value.every(isNumber)

function layersOf({ layers }: StepLine): WatchedLayer[] {
  if (!Array.isArray(layers)) return []
  return layers.filter(isFields).flatMap(({ name, groups = 1, load, stepMaxVio, dropped, bias }) => {
    if (typeof name !== 'string' || !areNumbers(load) || load.length === 0) return []
    const known = areNumbers(bias) && bias.length === load.length
    return {
      name,
      groups: isNumber(groups) && load.length % groups === 0 ? groups : 1,
      load,
      ...(isNumber(stepMaxVio) && { stepMaxVio }),
      ...(isNumber(dropped) && { dropped }),
      ...(known && { bias }),
    }
  })
}
