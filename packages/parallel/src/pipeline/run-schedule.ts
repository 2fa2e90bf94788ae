/** @file One step of a model in stages, as a schedule says: every rank does its part, and gradients gather in the parameters. */
import {
  checkOptions,
  full,
  keep,
  Lifetime,
  MoeError,
  type OptionNames,
  type Precision,
  type Tensor,
  zeros,
} from '@moe/core'
import { refusal } from '../check-call.ts'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import type { PieceRunner, RouteElsewhere } from '../experts/expert-shares.ts'
import { PiecewisePass } from '../experts/piecewise-pass.ts'
import { type Action, checkSchedule, type PipelineSchedule, type StagePass, stagesOf } from '../schedule/schedule.ts'
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
  /** The same in pieces of `pass`, where `RunOptions.route` says how routed experts are reached. Input, output and losses are leaves of it. */
  inPieces?(input: Tensor | null, microBatch: number, pass: PieceRunner, route: RouteElsewhere): Promise<StageOutput>
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
  /** What losses and metrics are multiplied by. Default 1. */
  readonly weight?: number
  /** How a pass reaches routed experts on other ranks: stages are run in pieces then. */
  readonly route?: (pass: PiecewisePass) => RouteElsewhere
  /** After each action of this rank. */
  readonly onAction?: (action: Action) => void
}

const names: OptionNames<RunOptions> = {
  between: true,
  metrics: true,
  precision: true,
  weight: true,
  route: true,
  onAction: true,
}

/** A micro-batch between its forward and its backward pass through a stage. */
interface UnderWay {
  readonly pass: PiecewisePass
  input: Tensor | null
  /** What goes on, then losses. */
  outputs: readonly Tensor[]
  /** Messages that still need its tensors. */
  readonly sending: Array<Promise<void>>
}

/**
 * Does this rank's part of a step: forward and backward passes of all micro-batches in the order of the schedule, each as soon as what it needs has come. Adds to
 * `.grad` of the stages' parameters; norm, clipping and update are the caller's. Where a schedule has a stage on two ranks (DualPipe), `sumReplicas` makes their gradients one.
 *
 * Sending and receiving go on while this rank computes. The two passes of an overlapped pair are under way at once: while one waits, for a message or for experts of other ranks, the other computes.
 * @param stages the stages that the schedule gives this rank, by number
 * @returns the sums of all losses and of each metric, `f32 []`, the same on every rank
 * @throws MoeError E_CONFIG for a schedule that is none, another number of ranks, a stage that is missing or gives nothing to the next
 */
export async function runSchedule(
  schedule: PipelineSchedule,
  ranks: Communicator,
  stages: ReadonlyMap<number, PipelineStage>,
  options: RunOptions,
): Promise<{ loss: Tensor; metrics: Record<string, Tensor> }> {
  checkOptions('runSchedule', options, names)
  const { between, metrics = [], precision, weight = 1, route, onAction } = options
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
  /** Passes of the action that this rank is at. */
  let current: ReadonlyArray<Promise<void>> = []
  const zero = () => keep(zeros([], { backend: between.backend }))
  let total = zero()
  const totals = new Map(metrics.map(name => [name, zero()]))

  const forward = async ({ stage, microBatch }: StagePass) => {
    const own: UnderWay = { pass: new PiecewisePass({ precision }), input: null, outputs: [], sending: [] }
    underWay.set(keyOf({ stage, microBatch }), own)
    const { pass } = own
    if (stage > 0) {
      const came = await mail.take({ kind: 'activation', stage, microBatch })
      own.input = pass.input(came)
      came.dispose()
    }
    const run = stages.get(stage) as PipelineStage
    const part = await (route !== undefined && run.inPieces !== undefined
      ? run.inPieces(own.input, microBatch, pass, route(pass))
      : inOnePiece(run, own.input, microBatch, pass))
    const { output, losses = [], metrics: measured = {} } = part
    if (stage < last) {
      if (output === undefined) throw noOutput(schedule, stage)
      own.sending.push(mail.send(output, { kind: 'activation', stage: stage + 1, microBatch }))
    }
    for (const loss of losses) total = replaced(total, loss, weight)
    for (const [name, value] of Object.entries(measured)) {
      const before = totals.get(name)
      if (before === undefined) throw unknownMetric(schedule, stage, name)
      totals.set(name, replaced(before, value, weight))
    }
    own.outputs = stage < last ? [output as Tensor, ...losses] : losses
  }

  /** @param sent what this rank has to send before */
  const backwardToInput = async (part: StagePass, putOff: boolean, sent?: Promise<void>) => {
    const { stage, microBatch } = part
    const { pass, input, outputs, sending } = underWay.get(keyOf(part)) as UnderWay
    const gradient = stage === last ? null : await mail.take({ kind: 'gradient', stage, microBatch })
    const ofLoss = () => pass.run(() => full([], weight, { backend: between.backend }))
    await pass.backwardInput(
      outputs,
      outputs.map((_, i) => (i === 0 && gradient !== null ? gradient : ofLoss())),
      { putOff },
    )
    gradient?.dispose()
    if (input === null) return
    // A stage that makes nothing of its input.
    const back = pass.gradient(input) ?? pass.run(() => zeros(input.shape, { backend: input.backend }))
    await sent
    sending.push(mail.send(back, { kind: 'gradient', stage: stage - 1, microBatch }).finally(() => back.dispose()))
  }

  const backwardToWeights = (part: StagePass) => {
    const { pass, sending } = underWay.get(keyOf(part)) as UnderWay
    pass.weights()
    underWay.delete(keyOf(part))
    freeing.push(Promise.all(sending).then(() => pass.dispose()))
  }

  const backward = async (part: StagePass, sent?: Promise<void>) => {
    await backwardToInput(part, false, sent)
    backwardToWeights(part)
  }

  /** Resolves when the action is done. */
  const begin = (action: Action): Array<Promise<void>> => {
    if (action.kind === 'overlapped') {
      const forth = forward(action.forward)
      return [forth, backward(action.backward, forth)]
    }
    if (action.kind === 'forward') return [forward(action)]
    if (action.kind === 'backward') return [backward(action)]
    if (action.kind === 'backwardInput') return [backwardToInput(action, true)]
    backwardToWeights(action)
    return []
  }

  try {
    for (const action of schedule.ranks[ranks.rank]) {
      current = begin(action)
      await Promise.all(current)
      onAction?.(action)
    }
    await Promise.all([received, ...freeing])
    const [loss, ...sums] = await ranks.allReduce([total, ...totals.values()])
    return { loss, metrics: Object.fromEntries(metrics.map((name, i) => [name, sums[i]])) }
  } finally {
    for (const sum of [total, ...totals.values()]) sum.dispose()
    // After a failure: what is under way goes, when nothing computes with it and no message needs it any more.
    for (const { pass, sending } of underWay.values())
      void Promise.allSettled(current)
        .then(() => Promise.allSettled(sending))
        .then(() => pass.dispose())
    void Promise.allSettled(freeing)
    mail.discard()
  }
}

/** A pass without waits. */
function inOnePiece(stage: PipelineStage, input: Tensor | null, microBatch: number, pass: PiecewisePass): StageOutput {
  let part: StageOutput = {}
  const inputs: readonly Tensor[] = input === null ? [] : [input]
  const made = pass.piece(inputs, (...own) => {
    part = stage.forward(own[0] ?? null, microBatch)
    const { output, losses = [] } = part
    return output === undefined ? losses : [output, ...losses]
  })
  const { output, ...others } = part
  return output === undefined ? { ...others, losses: made } : { ...others, output: made[0], losses: made.slice(1) }
}

/** The first and so many times the second, which lives until it is disposed; the first is used up. */
function replaced(total: Tensor, loss: Tensor, weight: number): Tensor {
  const life = new Lifetime()
  const sum = life.run(() => total.detach().add(weight === 1 ? loss.detach() : loss.detach().mul(weight)))
  sum.owner = null
  life.dispose()
  total.dispose()
  return sum
}

/** @throws MoeError E_CONFIG for a schedule of another number of ranks */
export function checkSize(schedule: PipelineSchedule, ranks: Communicator): void {
  if (schedule.ranks.length === ranks.size) return
  const problem = `the schedule is for ${schedule.ranks.length} ranks, there are ${ranks.size}`
  throw refusal(schedule.name, problem, 'make a schedule for as many')
}

function checkRank(schedule: PipelineSchedule, ranks: Communicator, stages: ReadonlyMap<number, PipelineStage>): void {
  checkSize(schedule, ranks)
  const missing = stagesOf(schedule, ranks.rank).filter(stage => !stages.has(stage))
  if (missing.length > 0)
    throw refusal(
      schedule.name,
      `rank ${ranks.rank} has no stage ${missing.join(', ')}`,
      `pass those of stagesOf(schedule, rank): ${stagesOf(schedule, ranks.rank).join(', ')}`,
    )
}

function unknownMetric(schedule: PipelineSchedule, stage: number, name: string): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: schedule.name,
    problem: `stage ${stage} measures ${name}, which is not among the metrics`,
    fix: 'name the metrics of all stages in { metrics }, the same on every rank',
  })
}

function noOutput(schedule: PipelineSchedule, stage: number): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: schedule.name,
    problem: `stage ${stage} of ${schedule.stages} has no output`,
    fix: 'return { output } from all stages but the last',
  })
}
