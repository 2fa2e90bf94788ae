/** @file One step of a model in stages, as a schedule says: every rank does its part, and gradients gather in the parameters. */
import {
  backwardInput,
  checkOptions,
  keep,
  Lifetime,
  MoeError,
  type Precision,
  type SplitBackward,
  type Tensor,
  withPrecision,
  zeros,
} from '@moe/core'
import { refusal } from '../check-call.ts'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import { type Action, checkSchedule, partsOf, type Schedule, type StagePass, stagesOf } from '../schedule/schedule.ts'
import { Mail } from './mail.ts'

/** A part of a model. Parameters are its own business. */
export interface PipelineStage {
  /**
   * The forward pass of one micro-batch.
   * @param input what the stage before put out; null in the first stage
   * @returns what the next stage gets (the last one has none), and losses of this stage, scalars: of the last one the loss itself, of others what they add to it,
   * as a balance loss. Their sum over all stages and micro-batches is what is differentiated, so divide by the micro-batches where the mean is meant.
   */
  forward(input: Tensor | null, microBatch: number): StageOutput
}

/** What a stage makes of a micro-batch. */
export interface StageOutput {
  /** What the next stage gets; the last one has none. */
  readonly output?: Tensor
  /** Scalars that are added to what is differentiated. */
  readonly losses?: readonly Tensor[]
  /** Scalars to sum up over all stages and micro-batches, detached, by name: those that `RunOptions.metrics` lists. */
  readonly metrics?: Readonly<Record<string, Tensor>>
}

/** What goes between stages, and how they compute. */
export interface RunOptions {
  /** Shape and dtype of what goes from a stage to the next. */
  readonly between: TensorLike
  /** Names of all metrics that any stage gives. */
  readonly metrics?: readonly string[]
  /** Arithmetic of matrix products. Default f32. */
  readonly precision?: Precision
  /** After each action of this rank. */
  readonly onAction?: (action: Action) => void
}

/** A micro-batch between its forward and its backward pass through a stage. */
interface UnderWay {
  readonly life: Lifetime
  readonly input: Tensor | null
  outputs: readonly Tensor[]
  /** Messages that still need its tensors. */
  readonly sending: Array<Promise<void>>
  split?: SplitBackward
}

/**
 * Does this rank's part of a step: forward and backward passes of all micro-batches in the order of the schedule, each as soon as what it needs has come. Adds to
 * `.grad` of the stages' parameters; norm, clipping and update are the caller's. Where a schedule has a stage on two ranks (DualPipe), `sumReplicas` makes their gradients one.
 *
 * Sending and receiving go on while this rank computes. The two passes of an overlapped pair are done one after the other: overlapping their insides is a matter of the
 * device's queues and of the stage.
 * @param stages the stages that the schedule gives this rank, by number
 * @returns the sums of all losses and of each metric, `f32 []`, the same on every rank
 * @throws MoeError E_CONFIG for a schedule that is none, another number of ranks, a stage that is missing or gives nothing to the next
 */
export async function runSchedule(
  schedule: Schedule,
  ranks: Communicator,
  stages: ReadonlyMap<number, PipelineStage>,
  options: RunOptions,
): Promise<{ loss: Tensor; metrics: Record<string, Tensor> }> {
  checkOptions('runSchedule', options, { between: true, metrics: true, precision: true, onAction: true })
  const { between, metrics = [], precision = 'f32', onAction } = options
  checkSchedule(schedule)
  checkRank(schedule, ranks, stages)
  const mail = new Mail(schedule, ranks, between)
  const received = mail.end()
  // Its failure reaches whoever waits for a message, and is thrown again at the end.
  received.catch(() => {})
  const last = schedule.stages - 1
  const underWay = new Map<string, UnderWay>()
  const freeing: Array<Promise<void>> = []
  const keyOf = ({ stage, microBatch }: StagePass) => `${stage} ${microBatch}`
  const zero = () => keep(zeros([], { backend: between.backend }))
  let total = zero()
  const totals = new Map(metrics.map(name => [name, zero()]))

  const forward = async ({ stage, microBatch }: StagePass) => {
    const life = new Lifetime()
    const input = stage === 0 ? null : await mail.take({ kind: 'activation', stage, microBatch })
    const sending: Array<Promise<void>> = []
    const own: UnderWay = { life, input, outputs: [], sending }
    underWay.set(keyOf({ stage, microBatch }), own)
    const part = life.run(() => {
      if (input !== null) input.tracked = true
      return withPrecision(precision, () => (stages.get(stage) as PipelineStage).forward(input, microBatch))
    })
    const { output, losses = [], metrics: measured = {} } = part
    if (stage < last) {
      if (output === undefined) throw noOutput(schedule, stage)
      sending.push(mail.send(output, { kind: 'activation', stage: stage + 1, microBatch }))
    }
    for (const loss of losses) total = replaced(total, loss)
    for (const [name, value] of Object.entries(measured)) {
      const before = totals.get(name)
      if (before === undefined) throw unknownMetric(schedule, stage, name)
      totals.set(name, replaced(before, value))
    }
    own.outputs = stage < last ? [output as Tensor, ...losses] : losses
  }

  const backwardToInput = async (pass: StagePass) => {
    const { stage, microBatch } = pass
    const own = underWay.get(keyOf(pass)) as UnderWay
    const gradient = stage === last ? null : await mail.take({ kind: 'gradient', stage, microBatch })
    const { life, input, outputs } = own
    const seeds = stage === last ? [] : [gradient]
    own.split = life.run(() => backwardInput(outputs, input === null ? [] : [input], seeds))
    gradient?.dispose()
    if (input === null) return
    // A stage that makes nothing of its input.
    const back = own.split.gradients[0] ?? zeros(input.shape, { backend: input.backend })
    own.sending.push(mail.send(back, { kind: 'gradient', stage: stage - 1, microBatch }).finally(() => back.dispose()))
  }

  const backwardToWeights = (pass: StagePass) => {
    const own = underWay.get(keyOf(pass)) as UnderWay
    own.life.run(() => own.split?.weights())
    underWay.delete(keyOf(pass))
    freeing.push(
      Promise.all(own.sending).then(() => {
        own.input?.dispose()
        own.life.dispose()
      }),
    )
  }

  try {
    for (const action of schedule.ranks[ranks.rank]) {
      for (const part of partsOf(action)) {
        if (part.kind === 'forward') await forward(part)
        if (part.kind === 'backward' || part.kind === 'backwardInput') await backwardToInput(part)
        if (part.kind === 'backward' || part.kind === 'backwardWeight') backwardToWeights(part)
      }
      onAction?.(action)
    }
    await Promise.all([received, ...freeing])
    const [loss, ...sums] = await ranks.allReduce([total, ...totals.values()])
    return { loss, metrics: Object.fromEntries(metrics.map((name, i) => [name, sums[i]])) }
  } finally {
    for (const sum of [total, ...totals.values()]) sum.dispose()
    // After a failure: what is under way goes, when no message needs it any more.
    for (const { sending, split, input, life } of underWay.values()) {
      void Promise.allSettled(sending).then(() => {
        split?.dispose()
        input?.dispose()
        life.dispose()
      })
    }
    void Promise.allSettled(freeing)
    mail.discard()
  }
}

/** The sum of both, which lives until it is disposed; the first is used up. */
function replaced(total: Tensor, loss: Tensor): Tensor {
  const life = new Lifetime()
  const sum = life.run(() => total.detach().add(loss.detach()))
  sum.owner = null
  life.dispose()
  total.dispose()
  return sum
}

/** @throws MoeError E_CONFIG for a schedule of another number of ranks */
export function checkSize(schedule: Schedule, ranks: Communicator): void {
  if (schedule.ranks.length === ranks.size) return
  const problem = `the schedule is for ${schedule.ranks.length} ranks, there are ${ranks.size}`
  throw refusal(schedule.name, problem, 'make a schedule for as many')
}

function checkRank(schedule: Schedule, ranks: Communicator, stages: ReadonlyMap<number, PipelineStage>): void {
  checkSize(schedule, ranks)
  const missing = stagesOf(schedule, ranks.rank).filter(stage => !stages.has(stage))
  if (missing.length > 0)
    throw refusal(
      schedule.name,
      `rank ${ranks.rank} has no stage ${missing.join(', ')}`,
      `pass those of stagesOf(schedule, rank): ${stagesOf(schedule, ranks.rank).join(', ')}`,
    )
}

function unknownMetric(schedule: Schedule, stage: number, name: string): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: schedule.name,
    problem: `stage ${stage} measures ${name}, which is not among the metrics`,
    fix: 'name the metrics of all stages in { metrics }, the same on every rank',
  })
}

function noOutput(schedule: Schedule, stage: number): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: schedule.name,
    problem: `stage ${stage} of ${schedule.stages} has no output`,
    fix: 'return { output } from all stages but the last',
  })
}
