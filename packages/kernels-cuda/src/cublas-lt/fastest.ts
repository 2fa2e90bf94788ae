/** @file Finds the fastest of several ways to compute the same. */

const repeats = 3

/**
 * Index of the fastest way (the first if several are equal). Each runs once to be loaded, and then a few times; the shortest time counts.
 * @param time Runs a way and returns its time.
 */
export function fastest(ways: ReadonlyArray<() => void>, time: (way: () => void) => number): number {
  const times = ways.map(way => {
    way()
    return Math.min(...Array.from({ length: repeats }, () => time(way)))
  })
  return times.indexOf(Math.min(...times))
}
