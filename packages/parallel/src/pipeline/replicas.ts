/** @file Parameters that several ranks of a pipeline hold: their gradients are summed. */
import { Lifetime, type Parameter, zeros } from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import { type PipelineSchedule, stagesOf } from '../schedule/schedule.ts'

/**
 * Returns the ranks that hold each parameter, lowest first. Several ranks hold those of a stage that is on two ranks (DualPipe), and those that several
 * stages use, such as an embedding shared with MTP modules.
 */
export function holdersOf(
  schedule: PipelineSchedule,
  parametersOf: (stage: number) => readonly Parameter[],
): Map<Parameter, number[]> {
  const holders = new Map<Parameter, number[]>()
  for (const rank of schedule.ranks.keys())
    for (const parameter of new Set(stagesOf(schedule, rank).flatMap(parametersOf)))
      holders.set(parameter, [...(holders.get(parameter) ?? []), rank])
  return holders
}

/** Parameters that the same ranks of a pipeline hold. */
export interface HeldParameters {
  /** The ranks, lowest first. */
  readonly holders: readonly number[]
  readonly parameters: readonly Parameter[]
}

/**
 * Returns the parameters of a pipeline by the ranks that hold them, in the same order on all ranks, and in rounds: no rank is in two sets of a round, so that the sets of a round can
 * be groups of a communicator at the same time.
 */
export function heldInRounds(holdersOfEach: ReadonlyMap<Parameter, readonly number[]>): HeldParameters[][] {
  const sets = new Map<string, { holders: readonly number[]; parameters: Parameter[] }>()
  for (const [parameter, holders] of holdersOfEach) {
    const set = sets.get(holders.join()) ?? { holders, parameters: [] }
    set.parameters.push(parameter)
    sets.set(holders.join(), set)
  }
  const rounds: HeldParameters[][] = []
  for (const set of sets.values()) {
    const isFree = (round: readonly HeldParameters[]) =>
      round.every(({ holders }) => !holders.some(rank => set.holders.includes(rank)))
    const round = rounds.find(isFree)
    if (round === undefined) rounds.push([set])
    else round.push(set)
  }
  return rounds
}

/**
 * Sums the gradients of each parameter that several ranks hold, over these ranks; all of them get the same bits. Needed for schedules with a stage on two ranks (DualPipe) and for
 * parameters that several stages use. All ranks call it after `runSchedule`, before computing the gradient norm.
 * @param parametersOf returns the parameters of any stage, in the same order on all ranks
 */
export async function sumReplicas(
  schedule: PipelineSchedule,
  ranks: Communicator,
  parametersOf: (stage: number) => readonly Parameter[],
): Promise<void> {
  for (const [parameter, group] of holdersOf(schedule, parametersOf))
    if (parameter.trainable && group.length > 1 && group.includes(ranks.rank)) await sumOver(group, ranks, parameter)
}

async function sumOver(group: readonly number[], ranks: Communicator, parameter: Parameter): Promise<void> {
  const { shape, backend, grad } = parameter
  const own = grad ?? zeros(shape, { backend })
  const others = group.filter(rank => rank !== ranks.rank)
  const [received] = await Promise.all([
    Promise.all(others.map(rank => ranks.receive(own, rank))),
    ...others.map(rank => ranks.send(own, rank)),
  ])
  const terms = group.map(rank => (rank === ranks.rank ? own : received[others.indexOf(rank)]))
  const life = new Lifetime()
  const sum = life.run(() => terms.reduce((total, term) => total.add(term)))
  sum.owner = null
  life.dispose()
  for (const term of terms) term.dispose()
  parameter.grad = sum
}
