/** @file Checks of arguments for callers that no compiler checks: those who write JavaScript, or who forget an `await`. */
import { MoeError } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'

export const configError = (op: string, problem: string, fix: string) =>
  new MoeError({ code: 'E_CONFIG', op, problem, fix })

/** @throws MoeError E_CONFIG if `ranks` is not a communicator, for example a promise of one */
export function checkRanks(op: string, ranks: Communicator): void {
  if (typeof ranks?.allReduce === 'function') return
  const problem = (ranks as unknown) instanceof Promise ? 'ranks is a promise' : 'ranks is not a communicator'
  throw configError(
    op,
    problem,
    'pass the result of await mpi(), or the communicator that local(size, work) passes to work',
  )
}

/** @throws MoeError E_CONFIG if `batches` is not an array */
export function checkBatches(op: string, batches: unknown): void {
  if (Array.isArray(batches)) return
  throw configError(op, 'the micro-batches are not an array', 'pass [batch], or order.step(step) of a TrainingOrder')
}
