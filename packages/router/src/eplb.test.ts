import { Random } from '@moe/core'
import { expect, test } from 'vitest'
import { gpuImbalance, placeExperts } from './index.ts'

// The example of deepseek-ai/EPLB's README.
const loads = [
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
const cluster = { replicas: 16, groups: 4, nodes: 2, gpus: 8 }

test('gives the placements of the EPLB README', () => {
  const placements = loads.map(load => placeExperts(load, cluster))
  expect(placements.map(({ physicalToLogical }) => physicalToLogical)).toEqual([
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
  ])
  expect(placements.map(({ copies }) => copies)).toEqual([
    [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
    [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
  ])
  expect(placements[0].logicalToPhysical[5]).toEqual([0, 2])
  expect(gpuImbalance(loads[0], placements[0], 8)).toBeCloseTo(1.2081, 4)
  expect(gpuImbalance(loads[1], placements[1], 8)).toBeCloseTo(1.2422, 4)
})

test('places experts globally if nodes do not divide the groups', () => {
  const placement = placeExperts(loads[0], { ...cluster, groups: 3 })
  expect(new Set(placement.physicalToLogical)).toEqual(new Set(loads[0].keys()))
  expect(placement.physicalToLogical.length).toBe(16)
  expect(placement).toEqual(placeExperts(loads[0], { replicas: 16, gpus: 8 }))
  expect(gpuImbalance(loads[0], placement, 8)).toBeLessThan(1.2081)
})

test('is the identity with as many GPUs and replicas as experts', () => {
  expect(placeExperts([3, 1, 2], { replicas: 3, gpus: 3 }).physicalToLogical).toEqual([0, 1, 2])
})

test('reports all invalid sizes and loads', () => {
  expect(() => placeExperts(loads[0], { replicas: 10, groups: 5, gpus: 4 })).toThrow(
    /replicas = 10 is less than the number of experts, 12; gpus = 4 does not divide replicas = 10; groups = 5 does not divide 12/,
  )
  expect(() => placeExperts([], { replicas: 4, nodes: Number.NaN, gpus: 1.5 })).toThrow(
    /experts = 0 is not a positive integer; gpus = 1.5 is not a positive integer; nodes = NaN is not/,
  )
  expect(() => placeExperts([1, Number.NaN], { replicas: 2, gpus: 1 })).toThrow('the load of expert 1 is null')
  const placement = placeExperts([1, 2, 3, 4], { replicas: 4, gpus: 2 })
  expect(() => gpuImbalance([1, 2, 3, 4], placement, 3)).toThrow('gpus = 3 does not divide the 4 places')
  expect(() => gpuImbalance([1, 2, 3, Number.NaN], placement, 2)).toThrow('the load of expert 3 is null')
})

test('GPUs without any load are balanced', () => {
  const nothing = [0, 0, 0, 0]
  expect(gpuImbalance(nothing, placeExperts(nothing, { replicas: 6, gpus: 2 }), 2)).toBe(1)
})

test('for random loads and clusters, places every expert, fills every GPU, keeps groups on one node, and copies the busiest experts', () => {
  const random = new Random(7)
  const from = <T>(values: readonly T[]) => values[random.integer(values.length)]
  for (let trial = 0; trial < 60; trial++) {
    const nodes = from([1, 2, 3, 4])
    const gpus = nodes * from([1, 2, 4])
    const groups = from([1, nodes, nodes + 1, 2 * nodes])
    const experts = groups * gpus * from([1, 2, 3])
    const replicas = experts + gpus * random.integer(4)
    const load = Array.from({ length: experts }, () => random.integer(200))
    const { physicalToLogical, logicalToPhysical, copies } = placeExperts(load, { replicas, groups, nodes, gpus })
    expect(physicalToLogical.length).toBe(replicas)
    expect(logicalToPhysical.flat().sort((a, b) => a - b)).toEqual([...physicalToLogical.keys()])
    expect(copies.reduce((sum, n) => sum + n)).toBe(replicas)
    for (const [expert, places] of logicalToPhysical.entries()) {
      expect(places.length).toBe(copies[expert])
      expect(places.length).toBeGreaterThanOrEqual(1)
      expect(places.every(place => physicalToLogical[place] === expert)).toBe(true)
    }
    if (groups % nodes !== 0) {
      expect(physicalToLogical).toEqual(placeExperts(load, { replicas, gpus }).physicalToLogical)
      continue
    }
    const nodesOf = new Map<number, Set<number>>()
    for (const [place, expert] of physicalToLogical.entries()) {
      const group = Math.floor(expert / (experts / groups))
      nodesOf.set(group, (nodesOf.get(group) ?? new Set()).add(Math.floor(place / (replicas / nodes))))
    }
    expect([...nodesOf.values()].every(own => own.size === 1)).toBe(true)
    // The busiest expert of a node gets a copy: with one copy less, it would have the highest load there.
    const perCopy = load.map((x, i) => x / copies[i])
    for (let node = 0; node < nodes; node++) {
      const own = physicalToLogical.slice((node * replicas) / nodes, ((node + 1) * replicas) / nodes)
      const most = Math.max(...own.map(expert => perCopy[expert]))
      const copied = own.filter(expert => copies[expert] > 1)
      expect(copied.every(expert => load[expert] / (copies[expert] - 1) >= most)).toBe(true)
    }
  }
})
