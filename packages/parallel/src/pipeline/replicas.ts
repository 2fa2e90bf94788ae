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
