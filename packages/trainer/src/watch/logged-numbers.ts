/** @file Numbers that are logged now and then, each a curve of its own. */
import { isNumber } from './json-fields.ts'
import { RunSeries } from './run-series.ts'

/** A number over the steps of a run. Of a long one, each point is the mean of several. */
export interface LoggedCurve {
  /** Steps done. */
  readonly steps: readonly number[]
  /** As many as steps. */
  readonly values: ReadonlyArray<number | null>
}

/** Names beyond are left out: a file that is no log of ours must not fill the memory. */
const mostNames = 64
/** Least number of points of a long curve: all of them are sent whenever one is added. */
const points = 250

export class LoggedNumbers {
  readonly #series = new Map<string, RunSeries>()

  /** @param values those that are not numbers are passed over */
  push(step: number, values: Readonly<Record<string, unknown>>): void {
    for (const [name, value] of Object.entries(values)) {
      if (!isNumber(value)) continue
      if (!this.#series.has(name) && this.#series.size < mostNames) this.#series.set(name, new RunSeries(points))
      this.#series.get(name)?.push(step, { value })
    }
  }

  /** Forgets what was logged after a step. */
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
