/** @file The numbers of a step: those of its micro-batches, and their average. */
import type { TokenBatch } from './model.ts'

/** The numbers of a training step, on the host. */
export interface StepNumbers {
  /** Mean over counted positions, including auxiliary terms. */
  readonly loss: number
  /** Next-token negative log-likelihood in nats per counted position. */
  readonly nll: number
  /** Number of counted positions. */
  readonly count: number
  /** Norm of the gradient before clipping. */
  readonly gradNorm: number
  /** Metrics from the model's `loss`, averaged like the loss. */
  readonly metrics: Readonly<Record<string, number>>
  /** Numbers from the model's `afterStep`, for example `maxVio`. */
  readonly after: Readonly<Record<string, number>>
}

/** Runs training steps, one after the other. */
export interface Steps {
  step(batches: readonly TokenBatch[], options: { lr: number; step: number }): Promise<Omit<StepNumbers, 'count'>>
  /** Prepares the micro-batches of a later step while the device computes. */
  prepare(batches: readonly TokenBatch[]): void
  dispose(): void
}

/** The numbers of a micro-batch after its forward and backward pass. */
export interface Pass {
  /** Number of counted positions. */
  readonly count: number
  readonly metrics: readonly string[]
  /** Loss, summed negative log-likelihood, then metrics. */
  readonly values: ArrayLike<number>
}

/**
 * The weight of a micro-batch's gradient. A single micro-batch is already averaged by its loss. Gradients of several
 * are summed with weights proportional to their counted positions, scaled to be of order 1.
 */
export function weightOf(
  count: number,
  { rows, length }: Pick<TokenBatch, 'rows' | 'length'>,
  several: boolean,
): number {
  return several ? count / (rows * length) : 1
}

/** The factor that turns the weighted sum of gradients into their mean. */
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
