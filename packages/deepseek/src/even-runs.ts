/** @file A row of costs, cut into runs of about the same cost. */

/**
 * First places of `runs` runs that make up `costs`: the costliest run is as cheap as can be, and the sum of their squares as small as that allows.
 * @param runs from 1 to the number of costs; no run is empty
 */
export function evenRuns(costs: readonly number[], runs: number): readonly number[] {
  const { cost: limit } = cheapest(costs, runs, Math.max)
  return cheapest(costs, runs, (before, run) => (run > limit ? Number.POSITIVE_INFINITY : before + run * run)).starts
}

interface Cut {
  readonly cost: number
  readonly starts: readonly number[]
}

/** The cheapest cut. `join` gives the cost of a cut, from that of all its runs but the last, and the last run. */
function cheapest(costs: readonly number[], runs: number, join: (before: number, run: number) => number): Cut {
  const none: Cut = { cost: Number.POSITIVE_INFINITY, starts: [] }
  /** For every end the cheapest cut of the costs before it, into as many runs as there have been rounds. */
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
