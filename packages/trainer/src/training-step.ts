/** @file One optimizer step: forward and backward passes of its micro-batches, clipping, and the update. */
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
  type ParameterShard,
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
import { type ShardedUpdate, shardedAmong } from './sharded-update.ts'
import { average, factorOf, type StepNumbers, weightOf } from './step-numbers.ts'

/** Options of `trainingStep`. */
export interface TrainingStepOptions {
  /** Learning rate of this step. */
  readonly lr: number
  /** Clips the global gradient norm to this value. Default 1; Infinity disables clipping. */
  readonly clip?: number | undefined
  /** Precision of matrix products. Default f32. */
  readonly precision?: Precision | undefined
  /** Number of the step, for error messages. */
  readonly step?: number | undefined
  /**
   * Ranks that take this step together, each with equally many micro-batches of the same size. The result equals one
   * step on a batch with the rows of all ranks.
   */
  readonly ranks?: Ranks | undefined
  /**
   * The shard of the parameters that this rank updates for all ranks. The optimizer must be created from its
   * `parameters`. Default: every rank updates all parameters.
   */
  readonly shard?: ParameterShard | undefined
}

const names: OptionNames<TrainingStepOptions> = {
  lr: true,
  clip: true,
  precision: true,
  step: true,
  ranks: true,
  shard: true,
}

/**
 * Runs one optimizer step on one or more micro-batches. Each is weighted by its number of counted positions, so that
 * the gradient equals that of one batch with all rows. Terms of the loss that are no mean over these positions are
 * averaged with the same weights, so they can differ from those of one batch: a balance loss, and the mean of MTP over
 * its targets, of which documents have fewer.
 *
 * The device is read once, between the backward pass and the update (with `ranks`, also before gradients are summed). A
 * step whose loss or gradient is not finite changes nothing.
 *
 * @param parameters of the model, as `namedParameters` returns them
 * @returns loss, metrics and gradient norm of the step
 * @throws MoeError E_NAN if the loss or gradient norm is not finite
 */
export async function trainingStep(
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  optimizer: Optimizer,
  batches: readonly TokenBatch[],
  options: TrainingStepOptions,
): Promise<StepNumbers> {
  checkOptions('trainingStep', options, names)
  const { lr, clip = 1, precision = 'f32', step = 0, ranks, shard } = options
  const sharded = shardedAmong('trainingStep', ranks, shard)
  const trained = parameters.map(({ parameter }) => parameter).filter(parameter => parameter.trainable)
  const held: Tensor[] = []
  try {
    const several = batches.length > 1 || (ranks !== undefined && ranks.size > 1)
    const parts = batches.map(batch => {
      const part = pass(model, batch, several, precision)
      held.push(...scalarsOf(part))
      return part
    })
    const all = ranks === undefined ? null : await reduceOverRanks(ranks, parts, batches, trained, shard)
    const factor = factorOf((all ?? parts).map(({ weight }) => weight))
    const { passes, norm, gradScale } =
      all !== null && sharded !== undefined
        ? { passes: all, ...(await shardedNorm(sharded, trained[0].backend, clip, factor)) }
        : await ownNumbers(parts, trained, clip, factor)
    held.push(gradScale)
    const numbers = average(all ?? passes, norm, factor)
    const finite = Number.isFinite(numbers.loss) && Number.isFinite(numbers.gradNorm)
    if (!finite)
      throw sharded === undefined
        ? await nonFiniteStep(model, step, numbers)
        : await nonFiniteStepOnRanks(model, sharded, step, numbers)
    const update = () => {
      scope(() => noGrad(() => optimizer.step(lr, gradScale)))
      zeroGradients(trained)
    }
    const afterwards = async () => (await model.afterStep?.(ranks && (counts => ranks.allReduce(counts)))) ?? {}
    const both = () => {
      update()
      return afterwards()
    }
    if (shard === undefined) return { ...numbers, after: await both() }
    // A recorded step runs both before the weights are exchanged. Other ranks may replay such a step in this round, so
    // the order must be the same here.
    if (model.staged !== undefined) return { ...numbers, after: await shard.update(both) }
    await shard.update(update)
    return { ...numbers, after: await afterwards() }
  } finally {
    for (const tensor of held) tensor.dispose()
    zeroGradients(trained)
    zeroGradients(shard?.parameters.map(({ parameter }) => parameter) ?? [])
  }
}

/** A micro-batch after its forward and backward pass. Its scalars are still on the device. */
interface Pass {
  readonly loss: Tensor
  readonly nll: Tensor
  readonly metrics: ReadonlyArray<readonly [string, Tensor]>
  readonly count: number
  /** Weight of its gradient. */
  readonly weight: number
}

const scalarsOf = ({ loss, nll, metrics }: Pass): Tensor[] => [loss, nll, ...metrics.map(([, tensor]) => tensor)]

/** Sums the gradients over all ranks (or those of this rank's shard), and gathers the numbers of all micro-batches. */
async function reduceOverRanks(
  ranks: Ranks,
  parts: readonly Pass[],
  batches: readonly TokenBatch[],
  trained: readonly Parameter[],
  shard: ParameterShard | undefined,
) {
  const own = parts.map((part, i) => ({
    count: part.count,
    batch: batches[i],
    metrics: part.metrics.map(([name]) => name),
    values: noGrad(() => scope(() => concat(scalarsOf(part).map(scalar => scalar.reshape([1]))))),
  }))
  try {
    const all = await gatherPasses(ranks, own)
    if (shard !== undefined) await shard.sumGradients()
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

/** Reads losses, likelihoods, metrics and gradient norm as one vector. */
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

/** The gradient norm over the shards of all ranks. */
async function shardedNorm({ ranks, shard }: ShardedUpdate, backend: Backend, clip: number, factor: number) {
  using parts = gradientNormParts(
    shard.parameters.map(({ parameter }) => parameter.grad),
    backend,
  )
  const norm = await normOverRanks(ranks, parts)
  return { norm, gradScale: scope(() => clipScale(full([], norm, { backend }), clip, factor)) }
}

function zeroGradients(parameters: readonly Parameter[]): void {
  for (const parameter of parameters) parameter.zeroGrad()
}
