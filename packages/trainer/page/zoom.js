/** @file A range of a run in more detail than the points of the whole run. */

/**
 * Returns the range of steps to fetch for a zoomed view; undefined if the points of the whole run have enough detail,
 * because there is one per line or per pixel.
 * @param series of the whole run
 * @param view `{ range, across }`
 * @param pixels width of a chart
 */
export function wanted(series, { range, across }, pixels) {
  const { steps, columns } = series
  if (range === null || ![...columns.values()].some(({ min }) => min)) return undefined
  const x = across === 'tokens' ? (columns.get('tokens')?.mean ?? []) : steps
  const first = x.findIndex(value => value >= range[0])
  const last = x.findLastIndex(value => value !== null && value <= range[1])
  if (x.length === 0 || (first >= 0 && last - first + 1 >= pixels)) return undefined
  if (across === 'step') return [Math.max(0, Math.floor(range[0])), Math.ceil(range[1])]
  return [steps[Math.max(0, (first < 0 ? x.length : first) - 1)], steps[Math.min(x.length - 1, last + 1)]]
}

/** Returns the series of the whole run, with the points in the range of `part` replaced by those of `part`. */
export function joined(whole, part) {
  if (part.steps.length === 0) return whole
  const from = whole.steps.findIndex(step => step >= part.steps[0])
  const behind = whole.steps.findIndex(step => step > part.steps[part.steps.length - 1])
  const [begin, end] = [from < 0 ? whole.steps.length : from, behind < 0 ? whole.steps.length : behind]
  const join = (values, within) => [...values.slice(0, begin), ...within, ...values.slice(end)]
  const nothing = part.steps.map(() => null)
  return {
    steps: join(whole.steps, part.steps),
    columns: new Map(
      [...whole.columns].map(([name, { mean, min, max }]) => {
        const own = part.columns.get(name) ?? { mean: nothing }
        return [
          name,
          {
            mean: join(mean, own.mean),
            min: min && join(min, own.min ?? own.mean),
            max: max && join(max, own.max ?? own.mean),
          },
        ]
      }),
    ),
  }
}
