/** @file One optimizer step: forward and backward of its micro-batches, clipping, the update. */
import {
  type Backend,
  backward,
  checkOptions,
  concat,
  full,
  type NamedParameter,
  noGrad,
  type OptionNames,
  type Parameter,
  type ParameterShare,
  type Precision,
  reduceGradients,
  scope,
  type Tensor,
  withPrecision,
} from '@moe/core'
import { checkedLoss } from './check-model.ts'
import type { TokenBatch, TrainableModel } from './model.ts'
import { nonFiniteStep, nonFiniteStepOnRanks } from './non-finite.ts'
import { clipScale, gradientNorm, gradientNormParts } from './optim/clip.ts'
import type { Optimizer } from './optim/optimizer.ts'
import { gatherPasses, normOverRanks, type Ranks } from './ranks.ts'
import { type SharedUpdate, sharedAmong } from './shared-update.ts'
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
  /** What this one of the ranks updates, for all: the optimizer is made of its `parameters`. Default: every rank updates all. */
  readonly share?: ParameterShare
}

const names: OptionNames<TrainingStepOptions> = {
  lr: true,
  clip: true,
  precision: true,
  step: true,
  ranks: true,
  share: true,
}

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
  const { lr, clip = 1, precision = 'f32', step = 0, ranks, share } = options
  const shared = sharedAmong('trainingStep', ranks, share)
  const trained = parameters.map(({ parameter }) => parameter).filter(parameter => parameter.trainable)
  const held: Tensor[] = []
  try {
    const several = batches.length > 1 || (ranks !== undefined && ranks.size > 1)
    const parts = batches.map(batch => {
      const part = pass(model, batch, several, precision)
      held.push(...scalarsOf(part))
      return part
    })
    const all = ranks === undefined ? null : await together(ranks, parts, batches, trained, share)
    const factor = factorOf((all ?? parts).map(({ weight }) => weight))
    const { passes, norm, gradScale } =
      all !== null && shared !== undefined
        ? { passes: all, ...(await sharedNorm(shared, trained[0].backend, clip, factor)) }
        : await ownNumbers(parts, trained, clip, factor)
    held.push(gradScale)
    const numbers = average(all ?? passes, norm, factor)
    const finite = Number.isFinite(numbers.loss) && Number.isFinite(numbers.gradNorm)
    if (!finite)
      throw shared === undefined
        ? await nonFiniteStep(model, step, numbers)
        : await nonFiniteStepOnRanks(model, shared, step, numbers)
    const update = () => {
      optimizer.step(lr, gradScale)
      zeroGradients(trained)
    }
    const afterwards = async () => (await model.afterStep?.(ranks && (counts => ranks.allReduce(counts)))) ?? {}
    const both = () => {
      update()
      return afterwards()
    }
    if (share === undefined) return { ...numbers, after: await both() }
    // A recorded step is both at once, and weights are exchanged behind it: so they are here, as other ranks may replay.
    if (model.staged !== undefined) return { ...numbers, after: await share.update(both) }
    await share.update(update)
    return { ...numbers, after: await afterwards() }
  } finally {
    for (const tensor of held) tensor.dispose()
    zeroGradients(trained)
    zeroGradients(share?.parameters.map(({ parameter }) => parameter) ?? [])
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

/** Sums the gradients over the ranks, those of this rank's share where there is one. The micro-batches of all. */
async function together(
  ranks: Ranks,
  parts: readonly Pass[],
  batches: readonly TokenBatch[],
  trained: readonly Parameter[],
  share: ParameterShare | undefined,
) {
  const own = parts.map((part, i) => ({
    count: part.count,
    batch: batches[i],
    metrics: part.metrics.map(([name]) => name),
    values: noGrad(() => scope(() => concat(scalarsOf(part).map(scalar => scalar.reshape([1]))))),
  }))
  try {
    const all = await gatherPasses(ranks, own)
    if (share !== undefined) await share.sumGradients()
    else await reduceGradients(trained, gradients => ranks.allReduce(gradients))
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

/** Everything that the host wants to know, read as one vector: losses, likelihoods, metrics, gradient norm. */
async function ownNumbers(parts: readonly Pass[], trained: readonly Parameter[], clip: number, factor: number) {
  const { scalars, gradScale } = scope(() =>
    noGrad(() => {
      const norm = gradientNorm(trained)
      const scalars = concat([...parts.flatMap(scalarsOf), norm].map(tensor => tensor.reshape([1])))
      return { scalars, gradScale: clipScale(norm, clip, factor) }
    }),
  )
  const values = await scalars
    .values()
    .catch(error => {
      gradScale.dispose()
      throw error
    })
    .finally(() => scalars.dispose())
  let at = 0
  const passes = parts.map(({ count, metrics }) => {
    const own = values.subarray(at, at + 2 + metrics.length)
    at += own.length
    return { count, metrics: metrics.map(([name]) => name), values: own }
  })
  return { passes, norm: values[at], gradScale }
}

/** The norm over the shares of all ranks. */
async function sharedNorm({ ranks, share }: SharedUpdate, backend: Backend, clip: number, factor: number) {
  using parts = gradientNormParts(
    share.parameters.map(({ parameter }) => parameter.grad),
    backend,
  )
  const norm = await normOverRanks(ranks, parts)
  return { norm, gradScale: scope(() => clipScale(full([], norm, { backend }), clip, factor)) }
}

function zeroGradients(parameters: readonly Parameter[]): void {
  for (const parameter of parameters) parameter.zeroGrad()
}
