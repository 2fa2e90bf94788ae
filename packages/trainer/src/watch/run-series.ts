/** @file The metrics of a run, in bounded memory however long the run is. */

/** What a client has received of a series. */
export interface SeriesMark {
  readonly generation: number
  readonly points: number
}

/** Points from an index on, which replace what a client has from there. */
export interface SeriesPatch {
  readonly from: number
  /** Number of lines per point; the last point may have fewer. */
  readonly linesPerPoint: number
  /** The middle of each point's steps; for the first point, its first step, and for the last point, its last. */
  readonly steps: readonly number[]
  readonly columns: readonly ColumnPatch[]
}

export interface ColumnPatch {
  readonly name: string
  readonly mean: ReadonlyArray<number | null>
  /** Omitted if each point is a single line. */
  readonly min?: ReadonlyArray<number | null>
  readonly max?: ReadonlyArray<number | null>
}

interface Column {
  sum: number[]
  count: number[]
  min: number[]
  max: number[]
}

/** Further names are ignored, so that a file that is not our log cannot fill the memory. */
const mostColumns = 64

/**
 * Mean, minimum and maximum of each metric over consecutive lines. When there are twice as many points as requested,
 * neighbors are merged. So memory is bounded, each line costs the same, and no peak is lost.
 */
export class RunSeries {
  readonly #points: number
  /** Incremented whenever existing points (except the last) change. */
  #generation = 0
  #linesPerPoint = 1
  #first: number[] = []
  #last: number[] = []
  #lines: number[] = []
  readonly #columns = new Map<string, Column>()

  /** @param points minimum number of points for a run that is long enough */
  constructor(points = 1000) {
    this.#points = points
  }

  get mark(): SeriesMark {
    return { generation: this.#generation, points: this.#first.length }
  }

  /**
   * Adds a line. A line whose step is not larger than the last one restarts the series from there: points that reach to
   * that step or beyond are dropped.
   *
   * @param numbers values that are not numbers are ignored
   */
  push(step: number, numbers: Readonly<Record<string, unknown>>): void {
    this.cutBack(step - 1)
    const at = this.#pointFor(step)
    this.#last[at] = step
    this.#lines[at]++
    for (const name in numbers) {
      const value = numbers[name]
      if (name === 'step' || typeof value !== 'number') continue
      const column = this.#column(name)
      if (column === undefined) continue
      column.sum[at] = (column.sum[at] ?? 0) + value
      column.count[at] = (column.count[at] ?? 0) + 1
      column.min[at] = Math.min(column.min[at] ?? Number.POSITIVE_INFINITY, value)
      column.max[at] = Math.max(column.max[at] ?? Number.NEGATIVE_INFINITY, value)
    }
  }

  /** Drops the points that reach beyond a step. */
  cutBack(step: number): void {
    while (this.#last.length > 0 && this.#last[this.#last.length - 1] > step) this.#drop()
  }

  /** The points that a client lacks, including its last point, which may have grown. */
  patch(has?: SeriesMark): SeriesPatch {
    const from = has?.generation === this.#generation ? Math.max(0, has.points - 1) : 0
    const points = this.#first.length
    const whole = this.#linesPerPoint === 1
    const steps = this.#first.slice(from).map((first, i) => {
      const last = this.#last[from + i]
      return from + i === points - 1 ? last : from + i === 0 ? first : Math.round((first + last) / 2)
    })
    const columns = [...this.#columns].map(([name, { sum, count, min, max }]) => {
      const numbers = (of: (at: number) => number) =>
        Array.from({ length: points - from }, (_, i) => (count[from + i] ? rounded(of(from + i)) : null))
      const mean = numbers(at => sum[at] / count[at])
      return whole ? { name, mean } : { name, mean, min: numbers(at => min[at]), max: numbers(at => max[at]) }
    })
    return { from, linesPerPoint: this.#linesPerPoint, steps, columns }
  }

  #pointFor(step: number): number {
    const at = this.#first.length - 1
    if (at >= 0 && this.#lines[at] < this.#linesPerPoint) return at
    if (this.#first.length >= 2 * this.#points) {
      this.#halve()
      return this.#pointFor(step)
    }
    this.#lines.push(0)
    this.#last.push(step)
    return this.#first.push(step) - 1
  }

  #column(name: string): Column | undefined {
    let column = this.#columns.get(name)
    if (column === undefined && this.#columns.size < mostColumns) {
      column = { sum: [], count: [], min: [], max: [] }
      this.#columns.set(name, column)
    }
    return column
  }

  #drop(): void {
    this.#generation++
    const length = this.#first.length - 1
    for (const list of [this.#first, this.#last, this.#lines, ...this.#lists()])
      if (list.length > length) list.length = length
  }

  #lists(): number[][] {
    return [...this.#columns.values()].flatMap(({ sum, count, min, max }) => [sum, count, min, max])
  }

  /** Merges pairs of neighbors. */
  #halve(): void {
    this.#generation++
    this.#linesPerPoint *= 2
    const pairs = (list: readonly number[], join: (a: number, b: number) => number) =>
      Array.from({ length: Math.ceil(this.#first.length / 2) }, (_, i) => {
        const [a, b] = [list[2 * i], list[2 * i + 1]]
        return a === undefined ? b : b === undefined ? a : join(a, b)
      })
    const add = (a: number, b: number) => a + b
    for (const column of this.#columns.values()) {
      column.sum = pairs(column.sum, add)
      column.count = pairs(column.count, add)
      column.min = pairs(column.min, Math.min)
      column.max = pairs(column.max, Math.max)
    }
    this.#last = pairs(this.#last, Math.max)
    this.#lines = pairs(this.#lines, add)
    this.#first = pairs(this.#first, Math.min)
  }
}

/** Rounds to seven digits, which are enough for a chart. */
const rounded = (value: number) => Number(value.toPrecision(7))
