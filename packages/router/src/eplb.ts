/**
 * @file Placement of experts on GPUs, with copies of busy ones: EPLB, "expert parallelism load balancer"
 * (deepseek-ai/EPLB; V3 report 3.4). Works on plain numbers; ties go to the lowest index.
 */
import { checkOptions, MoeError, shown } from '@moe/core'
import { needNumbers } from './load.ts'

/** A placement of experts. */
export interface ExpertPlacement {
  /** The expert at each place. Place p is on GPU floor(p / (replicas / gpus)). */
  readonly physicalToLogical: readonly number[]
  /** The places of each expert, one for each copy. */
  readonly logicalToPhysical: readonly (readonly number[])[]
  /** Number of copies of each expert. */
  readonly copies: readonly number[]
}

/** Nodes, GPUs and places to distribute experts over. */
export interface ClusterShape {
  /** Total number of places: experts plus redundant copies. Must be divisible by `gpus`. */
  readonly replicas: number
  /** Number of groups of the gate; hierarchical placement keeps each group on one node. Default 1. */
  readonly groups?: number
  /** Number of nodes. Default 1. */
  readonly nodes?: number
  /** Number of GPUs on all nodes together. Must be divisible by `nodes`. */
  readonly gpus: number
}

/**
 * Distributes items over packs of equal length so that the weights are balanced: heaviest first, each into the lightest
 * pack with room.
 */
function pack(weights: readonly number[], packs: number): Array<{ pack: number; rank: number }> {
  const room = weights.length / packs
  if (room === 1) return weights.map((_, i) => ({ pack: i, rank: 0 }))
  const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b)
  const sums = new Array<number>(packs).fill(0)
  const sizes = new Array<number>(packs).fill(0)
  const placed = new Array<{ pack: number; rank: number }>(weights.length)
  for (const item of order) {
    let best = -1
    for (let p = 0; p < packs; p++) if (sizes[p] < room && (best < 0 || sums[p] < sums[best])) best = p
    placed[item] = { pack: best, rank: sizes[best]++ }
    sums[best] += weights[item]
  }
  return placed
}

/**
 * Returns the expert at each of `places` places, and the number of copies of each expert. Each additional place goes to
 * the expert with the largest load per copy.
 */
function replicate(weights: readonly number[], places: number): { experts: number[]; copies: number[] } {
  const copies = weights.map(() => 1)
  const experts = weights.map((_, i) => i)
  while (experts.length < places) {
    let busiest = 0
    for (let i = 1; i < weights.length; i++) {
      if (weights[i] / copies[i] > weights[busiest] / copies[busiest]) busiest = i
    }
    experts.push(busiest)
    copies[busiest]++
  }
  return { experts, copies }
}

/**
 * Places the experts of one layer according to their loads: groups on nodes, then copies within each node, then places
 * on GPUs. If the number of groups is not divisible by the number of nodes, groups and nodes are ignored.
 * @throws MoeError E_ATTR if the numbers do not divide, or if there are fewer places than experts
 */
export function placeExperts(load: ArrayLike<number>, cluster: ClusterShape): ExpertPlacement {
  checkOptions('placeExperts', cluster, { replicas: true, groups: true, nodes: true, gpus: true })
  needNumbers('placeExperts', load)
  const loads = Array.from(load)
  const { replicas, gpus, groups: wanted = 1, nodes: all = 1 } = cluster
  checkSizes({ experts: loads.length, replicas, gpus, groups: wanted, nodes: all })
  const even = wanted % all === 0
  const groups = even ? wanted : 1
  const nodes = even ? all : 1
  checkShares(loads.length, replicas, groups, nodes, gpus)
  const size = loads.length / groups
  const groupLoads = Array.from({ length: groups }, (_, g) =>
    loads.slice(g * size, (g + 1) * size).reduce((sum, x) => sum + x, 0),
  )
  const homes = pack(groupLoads, nodes)
  const perGpu = replicas / gpus
  const physicalToLogical: number[] = []
  for (let node = 0; node < nodes; node++) {
    const here = homes
      .map((home, group) => ({ ...home, group }))
      .filter(home => home.pack === node)
      .sort((a, b) => a.rank - b.rank)
      .flatMap(({ group }) => Array.from({ length: size }, (_, i) => group * size + i))
    const { experts, copies } = replicate(
      here.map(expert => loads[expert]),
      replicas / nodes,
    )
    const placed = pack(
      experts.map(expert => loads[here[expert]] / copies[expert]),
      gpus / nodes,
    )
    placed.forEach(({ pack: gpu, rank }, i) => {
      physicalToLogical[((node * gpus) / nodes) * perGpu + gpu * perGpu + rank] = here[experts[i]]
    })
  }
  const logicalToPhysical: number[][] = loads.map(() => [])
  physicalToLogical.forEach((expert, place) => {
    logicalToPhysical[expert].push(place)
  })
  return { physicalToLogical, logicalToPhysical, copies: logicalToPhysical.map(places => places.length) }
}

/**
 * Returns the largest load of a GPU under a placement, relative to the mean; 1 is balanced, as no load at all is. The
 * copies of an expert share its load equally.
 * @throws MoeError E_ATTR for loads that are not numbers, or if the GPUs cannot share the places evenly
 */
export function gpuImbalance(load: ArrayLike<number>, placement: ExpertPlacement, gpus: number): number {
  needNumbers('gpuImbalance', load)
  const { length: places } = placement.physicalToLogical
  if (!Number.isInteger(gpus) || gpus < 1 || places % gpus !== 0) {
    throwIfAny('gpuImbalance', [`gpus = ${shown(gpus)} does not divide the ${places} places`])
  }
  const perGpu = places / gpus
  const sums = new Array<number>(gpus).fill(0)
  placement.physicalToLogical.forEach((expert, place) => {
    sums[Math.floor(place / perGpu)] += load[expert] / placement.copies[expert]
  })
  const mean = sums.reduce((sum, x) => sum + x, 0) / gpus
  return mean === 0 ? 1 : Math.max(...sums) / mean
}

function checkSizes(sizes: Readonly<Record<string, number>>): void {
  const wrong = Object.entries(sizes).filter(([, size]) => !Number.isInteger(size) || size < 1)
  throwIfAny(
    'placeExperts',
    wrong.map(([name, size]) => `${name} = ${shown(size)} is not a positive integer`),
  )
}

function checkShares(experts: number, replicas: number, groups: number, nodes: number, gpus: number): void {
  const problems: string[] = []
  if (replicas < experts) problems.push(`replicas = ${replicas} is less than the number of experts, ${experts}`)
  if (replicas % gpus !== 0) problems.push(`gpus = ${gpus} does not divide replicas = ${replicas}`)
  if (experts % groups !== 0) problems.push(`groups = ${groups} does not divide ${experts} experts`)
  if (gpus % nodes !== 0) problems.push(`nodes = ${nodes} does not divide gpus = ${gpus}`)
  throwIfAny('placeExperts', problems)
}

function throwIfAny(op: string, problems: readonly string[]): void {
  if (problems.length > 0) throw new MoeError({ code: 'E_ATTR', op, problem: problems.join('; ') })
}
