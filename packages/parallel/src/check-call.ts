/** @file What steps over ranks are asked first: who writes JavaScript, or forgets an `await`, learns it from no compiler. */
import { MoeError } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'

export const refusal = (op: string, problem: string, fix: string) =>
  new MoeError({ code: 'E_CONFIG', op, problem, fix })

/** @throws MoeError E_CONFIG for what is no communicator, such as the promise of one */
export function checkRanks(op: string, ranks: Communicator): void {
  if (typeof ranks?.allReduce === 'function') return
  const problem = (ranks as unknown) instanceof Promise ? 'ranks is a promise' : 'there are no ranks'
  throw refusal(op, problem, 'pass what await mpi() gives, or what local(size, work) gives to work')
}

/** @throws MoeError E_CONFIG for what is no list of micro-batches */
export function checkBatches(op: string, batches: unknown): void {
  if (Array.isArray(batches)) return
  throw refusal(op, 'the micro-batches are no list', 'pass [batch], or the steps of a TrainingOrder: order.step(step)')
}
