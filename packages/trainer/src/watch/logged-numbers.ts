/** @file Numbers that listeners log from time to time, one curve per name. */
import { isNumber } from './json-fields.ts'
import { RunSeries } from './run-series.ts'

/** A number over the steps of a run. In a long run, each point is the mean of several values. */
export interface LoggedCurve {
  /** Steps done. */
  readonly steps: readonly number[]
  /** One value per entry of `steps`. */
  readonly values: ReadonlyArray<number | null>
}

/** Further names are ignored, so that a file that is not our log cannot fill the memory. */
const mostNames = 64
/** Minimum number of points of a long curve. All of them are sent whenever one is added. */
const points = 250

export class LoggedNumbers {
  readonly #series = new Map<string, RunSeries>()

  /** @param values values that are not numbers are ignored */
  push(step: number, values: Readonly<Record<string, unknown>>): void {
    for (const [name, value] of Object.entries(values)) {
      if (!isNumber(value)) continue
      if (!this.#series.has(name) && this.#series.size < mostNames) this.#series.set(name, new RunSeries(points))
      this.#series.get(name)?.push(step, { value })
    }
  }

  /** Drops what was logged after a step. */
  cutBack(step: number): void {
    for (const series of this.#series.values()) series.cutBack(step)
  }

  clear(): void {
    this.#series.clear()
  }

  get curves(): Readonly<Record<string, LoggedCurve>> {
    const curves = [...this.#series].map(([name, series]): [string, LoggedCurve] => {
      const { steps, columns } = series.patch()
      return [name, { steps, values: columns[0].mean }]
    })
    return Object.fromEntries(curves)
  }
}
