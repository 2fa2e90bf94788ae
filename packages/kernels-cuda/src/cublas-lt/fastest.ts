/** @file Finds the fastest of several functions that compute the same result. */

const repeats = 3

/**
 * Returns the index of the fastest candidate (the first if several are equal). Each runs once to be loaded, and then a few times; the shortest time counts.
 * @param time runs a candidate and returns its time
 */
export function fastest(candidates: ReadonlyArray<() => void>, time: (candidate: () => void) => number): number {
  const times = candidates.map(candidate => {
    candidate()
    return Math.min(...Array.from({ length: repeats }, () => time(candidate)))
  })
  return times.indexOf(Math.min(...times))
}
