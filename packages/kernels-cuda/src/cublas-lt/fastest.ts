/** @file Which of several ways to compute the same takes the least time. */

const repeats = 3

/**
 * Index of the fastest way, the first of equals. Each runs once to be loaded and then a few times, of which the shortest counts.
 * @param time Runs it and gives its time.
 */
export function fastest(ways: ReadonlyArray<() => void>, time: (way: () => void) => number): number {
  const times = ways.map(way => {
    way()
    return Math.min(...Array.from({ length: repeats }, () => time(way)))
  })
  return times.indexOf(Math.min(...times))
}
