/** @file Parameters that several ranks have: their gradients are one sum. */
import { Lifetime, type Parameter, zeros } from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import { type PipelineSchedule, stagesOf } from '../schedule/schedule.ts'

/** For each parameter the ranks that have it, lowest first: one, but for those of a stage that lies on two ranks (DualPipe) or that several stages use (an embedding that MTP shares). */
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
 * Makes the gradient of every parameter that several ranks have the sum over them, the same bits on each. All ranks call it, after `runSchedule` and before the norm.
 * @param parametersOf the parameters of a stage, of any rank, in the same order on all
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
