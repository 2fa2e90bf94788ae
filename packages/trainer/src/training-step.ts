/** @file One optimizer step: forward and backward of its micro-batches, clipping, the update. */
import {
  backward,
  concat,
  full,
  type NamedParameter,
  noGrad,
  type Parameter,
  type Precision,
  scope,
  type Tensor,
  withPrecision,
} from '@moe/core'
import type { TokenBatch, TrainableModel } from './model.ts'
import { nonFiniteStep } from './non-finite.ts'
import { clipScale, gradientNorm } from './optim/clip.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { average, factorOf, type StepNumbers, weightOf } from './step-numbers.ts'

export interface StepOptions {
  /** Learning rate of this step. */
  readonly lr: number
  /** Largest norm over all gradients. Default 1; Infinity for none. */
  readonly clip?: number
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
  /** Number of the step, for error messages. */
  readonly step?: number
}

/**
 * Runs one step on one or more micro-batches, which weigh as much as they have counted positions: the gradient is that
 * of one batch that holds all their rows.
 *
 * The device is read once, between the backward pass and the update: a step whose loss or gradient is not finite
 * changes nothing.
 * @param parameters of the model, as `namedParameters` gives them
 * @throws MoeError E_NAN
 */
export async function trainingStep(
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  optimizer: Optimizer,
  batches: readonly TokenBatch[],
  options: StepOptions,
): Promise<StepNumbers> {
  const { lr, clip = 1, precision = 'f32', step = 0 } = options
  const trained = parameters.map(({ parameter }) => parameter).filter(parameter => parameter.trainable)
  const held: Tensor[] = []
  try {
    const several = batches.length > 1
    const parts = batches.map(batch => {
      const part = pass(model, batch, several, precision)
      held.push(...scalarsOf(part))
      return part
    })
    const factor = factorOf(parts.map(({ weight }) => weight))
    const { scalars, gradScale } = summarize(parts, trained, clip, factor)
    held.push(scalars, gradScale)
    const values = await scalars.values()
    let at = 0
    const passes = parts.map(({ count, metrics }) => {
      const own = values.subarray(at, at + 2 + metrics.length)
      at += own.length
      return { count, metrics: metrics.map(([name]) => name), values: own }
    })
    const numbers = average(passes, values[at], factor)
    const finite = Number.isFinite(numbers.loss) && Number.isFinite(numbers.gradNorm)
    if (!finite) throw await nonFiniteStep(model, step, numbers)
    optimizer.step(lr, gradScale)
    zeroGradients(trained)
    return { ...numbers, after: (await model.afterStep?.()) ?? {} }
  } finally {
    for (const tensor of held) tensor.dispose()
    zeroGradients(trained)
  }
}

/** A micro-batch that went forward and backward: its scalars are still on the device. */
interface Pass {
  readonly loss: Tensor
  readonly nll: Tensor
  readonly metrics: ReadonlyArray<readonly [string, Tensor]>
  readonly count: number
  /** What its gradient was multiplied by. */
  readonly weight: number
}

const scalarsOf = ({ loss, nll, metrics }: Pass): Tensor[] => [loss, nll, ...metrics.map(([, tensor]) => tensor)]

function pass(model: TrainableModel, batch: TokenBatch, several: boolean, precision: Precision): Pass {
  return scope(() =>
    withPrecision(precision, () => {
      const { loss, nll, count, metrics } = model.loss(batch, { training: true })
      const weight = weightOf(count, batch, several)
      backward(loss, several ? { gradient: full([], weight, { backend: loss.backend }) } : {})
      return { loss, nll, count, weight, metrics: Object.entries(metrics) }
    }),
  )
}

/** Everything that the host wants to know, in one vector: losses, likelihoods, metrics, gradient norm. */
function summarize(parts: readonly Pass[], trained: readonly Parameter[], clip: number, factor: number) {
  return scope(() =>
    noGrad(() => {
      const norm = gradientNorm(trained)
      const scalars = concat([...parts.flatMap(scalarsOf), norm].map(tensor => tensor.reshape([1])))
      return { scalars, gradScale: clipScale(norm, clip, factor) }
    }),
  )
}

function zeroGradients(parameters: readonly Parameter[]): void {
  for (const parameter of parameters) parameter.zeroGrad()
}
