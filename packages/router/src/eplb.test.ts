import { expect, test } from 'vitest'
import { gpuImbalance, placeExperts } from './index.ts'

// The example of deepseek-ai/EPLB's README.
const loads = [
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
const cluster = { replicas: 16, groups: 4, nodes: 2, gpus: 8 }

test('the placement of the EPLB README', () => {
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

test('without even groups, placement is global: still every expert once, busy ones more often, GPUs full', () => {
  const placement = placeExperts(loads[0], { ...cluster, groups: 3 })
  expect(new Set(placement.physicalToLogical)).toEqual(new Set(loads[0].keys()))
  expect(placement.physicalToLogical.length).toBe(16)
  expect(placement).toEqual(placeExperts(loads[0], { replicas: 16, gpus: 8 }))
  expect(gpuImbalance(loads[0], placement, 8)).toBeLessThan(1.2081)
})

test('one place per expert and GPU is the identity', () => {
  expect(placeExperts([3, 1, 2], { replicas: 3, gpus: 3 }).physicalToLogical).toEqual([0, 1, 2])
})

test('numbers that do not divide are all named', () => {
  expect(() => placeExperts(loads[0], { replicas: 10, groups: 5, gpus: 4 })).toThrow(
    /replicas = 10 are fewer than 12 experts; gpus = 4 does not divide replicas = 10; groups = 5 does not divide 12/,
  )
})
