/** @file Options, results and gradient norm of a training step that several ranks take together. */
import { type Backend, globalNormParts, MoeError, type Parameter, type Precision, zeros } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'

/** Options of a training step. */
export interface ParallelStepOptions {
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision | undefined
}

/** A micro-batch of held-out data. */
export interface EvaluatedBatch<Batch> {
  /** The rows. */
  readonly batch: Batch
  /** Positions before this one are context only and do not count. */
  readonly from: number
}

/** The loss of a micro-batch of held-out data. */
export interface EvaluatedLoss {
  /** Sum of the negative log-likelihoods over the positions that count, in nats. */
  readonly nll: number
  /** Number of positions that count. */
  readonly count: number
}

/** The result of a training step, the same on every rank. */
export interface ParallelStepResult {
  /** Mean loss over all micro-batches, weighted by their number of positions that carry loss. */
  readonly loss: number
  /** L2 norm of the whole model's gradient. */
  readonly gradNorm: number
  /** The model's metrics by name, averaged over all micro-batches in the same way. */
  readonly metrics: Readonly<Record<string, number>>
}

/**
 * Returns `result` if its loss and norm are finite. All ranks see the same numbers, so all of them throw or none does.
 * @throws MoeError E_NAN
 */
export function finite(op: string, result: ParallelStepResult): ParallelStepResult {
  const { loss, gradNorm } = result
  if (Number.isFinite(loss) && Number.isFinite(gradNorm)) return result
  throw new MoeError({
    code: 'E_NAN',
    op,
    problem: `the step has loss ${loss} and gradient norm ${gradNorm}`,
    fix: 'skip the optimizer step; resume from earlier weights with a lower learning rate or stronger gradient clipping',
    details: { loss, gradNorm },
  })
}

/**
 * The L2 norm of the gradients of all ranks.
 * @param counted parameters of this rank that no other rank counts
 */
export async function gradientNorm(
  ranks: Communicator,
  counted: readonly Parameter[],
  backend: Backend,
): Promise<number> {
  const gradients = counted.flatMap(({ grad }) => grad ?? [])
  using own = gradients.length === 0 ? zeros([3], { backend }) : globalNormParts(gradients)
  using all = await ranks.allGather(own)
  const parts = await all.values()
  let squares = 0
  for (let at = 0; at < parts.length; at += 3) squares += (parts[at] + parts[at + 1] + parts[at + 2]) ** 2
  return Math.fround(Math.sqrt(squares))
}
