/** @file What a step measures: numbers of its micro-batches, and their average. */
import type { TokenBatch } from './model.ts'

/** What a step measured, on the host. */
export interface StepNumbers {
  /** Mean over counted positions, with auxiliary terms. */
  readonly loss: number
  /** Next-token negative log-likelihood in nats per counted position. */
  readonly nll: number
  /** Counted positions. */
  readonly count: number
  /** Norm of the gradient before clipping. */
  readonly gradNorm: number
  /** What the model logs beside its loss, weighted like the loss. */
  readonly metrics: Readonly<Record<string, number>>
  /** What its `afterStep` returned: `maxVio` and the like. */
  readonly after: Readonly<Record<string, number>>
}

/** Takes steps, one after the other. */
export interface Steps {
  step(batches: readonly TokenBatch[], options: { lr: number; step: number }): Promise<Omit<StepNumbers, 'count'>>
  /** Makes the micro-batches of a later step ready, for while the device computes. */
  prepare(batches: readonly TokenBatch[]): void
  dispose(): void
}

/** A micro-batch that went forward and backward. */
export interface Pass {
  /** Counted positions. */
  readonly count: number
  readonly metrics: readonly string[]
  /** Loss, sum of the likelihoods, metrics. */
  readonly values: ArrayLike<number>
}

/**
 * What the gradient of a micro-batch is multiplied by. One alone is averaged by its loss; several add up sums, scaled to
 * be of order 1.
 */
export function weightOf(
  count: number,
  { rows, length }: Pick<TokenBatch, 'rows' | 'length'>,
  several: boolean,
): number {
  return several ? count / (rows * length) : 1
}

/** What the sum of the gradients of several micro-batches is multiplied by. */
export function factorOf(weights: readonly number[]): number {
  const total = weights.reduce((sum, weight) => sum + weight, 0)
  return weights.length === 1 || total === 0 ? 1 : 1 / total
}

/** @param norm of the gradient before `factor` */
export function average(passes: readonly Pass[], norm: number, factor: number): Omit<StepNumbers, 'after'> {
  const count = passes.reduce((sum, pass) => sum + pass.count, 0)
  const metrics: Record<string, number> = {}
  let loss = 0
  let nll = 0
  for (const pass of passes) {
    const share = count === 0 ? 1 / passes.length : pass.count / count
    loss += share * pass.values[0]
    nll += pass.values[1]
    for (const [i, name] of pass.metrics.entries()) metrics[name] = (metrics[name] ?? 0) + share * pass.values[2 + i]
  }
  return { loss, nll: nll / Math.max(1, count), count, gradNorm: factor * norm, metrics }
}
