/** @file Partitions a sequence of costs into consecutive runs of similar cost. */

/**
 * Partitions `costs` into consecutive runs. Minimizes the cost of the most expensive run and, among such partitions, the sum of squares.
 * @param runs from 1 to the number of costs; no run is empty
 * @returns the index at which each run starts
 */
export function balancedRuns(costs: readonly number[], runs: number): readonly number[] {
  const { cost: limit } = cheapest(costs, runs, Math.max)
  return cheapest(costs, runs, (before, run) => (run > limit ? Number.POSITIVE_INFINITY : before + run * run)).starts
}

interface Cut {
  readonly cost: number
  readonly starts: readonly number[]
}

/** Finds the cheapest partition. `join` returns the cost of a partition from that of all runs but the last, and that of the last. */
function cheapest(costs: readonly number[], runs: number, join: (before: number, run: number) => number): Cut {
  const none: Cut = { cost: Number.POSITIVE_INFINITY, starts: [] }
  /** The cheapest partition of the costs before each end, into as many runs as rounds so far. */
  let best: Cut[] = [{ cost: 0, starts: [] }, ...costs.map(() => none)]
  for (let round = 0; round < runs; round++) {
    const shorter = best
    best = shorter.map((_, end) => {
      let [found, run] = [none, 0]
      for (let start = end - 1; start >= 0; start--) {
        run += costs[start]
        const cost = join(shorter[start].cost, run)
        if (cost < found.cost) found = { cost, starts: [...shorter[start].starts, start] }
      }
      return found
    })
  }
  return best[costs.length]
}
