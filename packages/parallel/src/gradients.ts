/** @file Gradients of a step that several ranks take together. */
import { type Backend, globalNormParts, MoeError, type Parameter, type Precision, zeros } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'

/** How a step computes. */
export interface ParallelStepOptions {
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
}

/** What a step tells, the same on every rank. */
export interface ParallelStepResult {
  /** Over all micro-batches, each as heavy as it has positions that count. */
  readonly loss: number
  /** Norm of the whole model's gradient. */
  readonly gradNorm: number
  /** What the model measures, by name, over all micro-batches likewise. */
  readonly metrics: Readonly<Record<string, number>>
}

/** The same, if it can be applied. All ranks see the same numbers, so that all refuse. @throws MoeError E_NAN */
export function finite(op: string, result: ParallelStepResult): ParallelStepResult {
  const { loss, gradNorm } = result
  if (Number.isFinite(loss) && Number.isFinite(gradNorm)) return result
  throw new MoeError({
    code: 'E_NAN',
    op,
    problem: `the step has loss ${loss} and gradient norm ${gradNorm}`,
    fix: 'do not let the optimizer step; go on from earlier weights with a lower learning rate or clip',
    details: { loss, gradNorm },
  })
}

/** Norm over all ranks. @param counted parameters of this rank that no other rank counts */
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
