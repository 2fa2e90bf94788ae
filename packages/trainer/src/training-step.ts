/** @file One optimizer step: forward and backward of its micro-batches, clipping, the update. */
import {
  backward,
  checkOptions,
  concat,
  full,
  type NamedParameter,
  noGrad,
  type OptionNames,
  type Parameter,
  type Precision,
  reduceGradients,
  scope,
  type Tensor,
  withPrecision,
} from '@moe/core'
import { checkedLoss } from './check-model.ts'
import type { TokenBatch, TrainableModel } from './model.ts'
import { nonFiniteStep } from './non-finite.ts'
import { clipScale, gradientNorm } from './optim/clip.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { gatherPasses, type Ranks } from './ranks.ts'
import { average, factorOf, type StepNumbers, weightOf } from './step-numbers.ts'

/** Rate, clipping and arithmetic of one step. */
export interface TrainingStepOptions {
  /** Learning rate of this step. */
  readonly lr: number
  /** Largest norm over all gradients. Default 1; Infinity for none. */
  readonly clip?: number
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
  /** Number of the step, for error messages. */
  readonly step?: number
  /** Those that take this step together: it is that of one batch that holds the rows of all. Each calls this with as many micro-batches, of the same size. */
  readonly ranks?: Ranks
}

const names: OptionNames<TrainingStepOptions> = { lr: true, clip: true, precision: true, step: true, ranks: true }

/**
 * Runs one step on one or more micro-batches, which weigh as much as they have counted positions: the gradient is that
 * of one batch that holds all their rows.
 *
 * The device is read once, between the backward pass and the update (with ranks: also before their gradients are summed): a step whose loss or gradient is not finite
 * changes nothing.
 * @param parameters of the model, as `namedParameters` gives them
 * @throws MoeError E_NAN
 */
export async function trainingStep(
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  optimizer: Optimizer,
  batches: readonly TokenBatch[],
  options: TrainingStepOptions,
): Promise<StepNumbers> {
  checkOptions('trainingStep', options, names)
  const { lr, clip = 1, precision = 'f32', step = 0, ranks } = options
  const trained = parameters.map(({ parameter }) => parameter).filter(parameter => parameter.trainable)
  const held: Tensor[] = []
  try {
    const several = batches.length > 1 || (ranks !== undefined && ranks.size > 1)
    const parts = batches.map(batch => {
      const part = pass(model, batch, several, precision)
      held.push(...scalarsOf(part))
      return part
    })
    const all = ranks === undefined ? null : await together(ranks, parts, batches, trained)
    const factor = factorOf((all ?? parts).map(({ weight }) => weight))
    const { scalars, gradScale } = summarize(parts, trained, clip, factor)
    held.push(scalars, gradScale)
    const values = await scalars.values()
    let at = 0
    const ownPasses = parts.map(({ count, metrics }) => {
      const own = values.subarray(at, at + 2 + metrics.length)
      at += own.length
      return { count, metrics: metrics.map(([name]) => name), values: own }
    })
    const numbers = average(all ?? ownPasses, values[at], factor)
    const finite = Number.isFinite(numbers.loss) && Number.isFinite(numbers.gradNorm)
    if (!finite) throw await nonFiniteStep(model, step, numbers)
    optimizer.step(lr, gradScale)
    zeroGradients(trained)
    return { ...numbers, after: (await model.afterStep?.(ranks && (counts => ranks.allReduce(counts)))) ?? {} }
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

/** Sums the gradients over the ranks. The micro-batches of all. */
async function together(
  ranks: Ranks,
  parts: readonly Pass[],
  batches: readonly TokenBatch[],
  trained: readonly Parameter[],
) {
  const own = parts.map((part, i) => ({
    count: part.count,
    batch: batches[i],
    metrics: part.metrics.map(([name]) => name),
    values: noGrad(() => scope(() => concat(scalarsOf(part).map(scalar => scalar.reshape([1]))))),
  }))
  try {
    const all = await gatherPasses(ranks, own)
    await reduceGradients(trained, gradients => ranks.allReduce(gradients))
    return all
  } finally {
    for (const { values } of own) values.dispose()
  }
}

function pass(model: TrainableModel, batch: TokenBatch, several: boolean, precision: Precision): Pass {
  return scope(() =>
    withPrecision(precision, () => {
      const { loss, nll, count, metrics } = checkedLoss(model.loss(batch, { training: true }))
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
