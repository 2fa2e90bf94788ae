/** @file Stages that a schedule has on two ranks, whose gradients are one sum. */
import { Lifetime, type Parameter, zeros } from '@moe/core'
import type { Communicator } from '../communicator/communicator.ts'
import { type Schedule, stagesOf } from '../schedule/schedule.ts'

/**
 * Makes the gradients of every stage that lies on several ranks (DualPipe's lie on two) the sum over them, the same bits on each. Of schedules that have every stage
 * once it does nothing. All ranks call it, after `runSchedule` and before the norm.
 * @param parametersOf the parameters of a stage of this rank, in the same order on every rank that has it
 */
export async function sumReplicas(
  schedule: Schedule,
  ranks: Communicator,
  parametersOf: (stage: number) => readonly Parameter[],
): Promise<void> {
  const holders = schedule.ranks.map((_, rank) => new Set(stagesOf(schedule, rank)))
  for (const stage of stagesOf(schedule, ranks.rank)) {
    const group = [...holders.keys()].filter(rank => holders[rank].has(stage))
    if (group.length === 1) continue
    for (const parameter of parametersOf(stage)) await sumOver(group, ranks, parameter)
  }
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
