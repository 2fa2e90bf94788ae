/** @file Runs one pipeline-parallel step by a schedule. */
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
import { configError } from '../check-call.ts'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import type { PieceRunner, RouteTokens } from '../experts/expert-shards.ts'
import { PiecewisePass } from '../experts/piecewise-pass.ts'
import { awaitedLater } from '../failure.ts'
import { type Action, checkSchedule, type PipelineSchedule, type StagePass, stagesOf } from '../schedule/schedule.ts'
import { StageMessages } from './stage-messages.ts'

/** A stage of a model, which holds its parameters itself. */
export interface PipelineStage {
  /**
   * Runs the forward pass of one micro-batch.
   * @param input the output of the previous stage; null in the first stage
   * @returns the output for the next stage (none from the last one) and this stage's losses: the loss itself from the last stage, additional terms such as a balance loss
   * from others. The sum of the losses over all stages and micro-batches is differentiated, so divide by the number of micro-batches if you want their mean.
   */
  forward(input: Tensor | null, microBatch: number): StageOutput
  /** `forward` in pieces of `pass`, used with `RunOptions.route`. `route` applies routed experts; input, output and losses are leaves of the pass. */
  inPieces?(input: Tensor | null, microBatch: number, pass: PieceRunner, route: RouteTokens): Promise<StageOutput>
}

/** The result of a stage's forward pass. */
export interface StageOutput {
  /** The input of the next stage; the last stage has none. */
  readonly output?: Tensor
  /** Scalars that are added to the loss. */
  readonly losses?: readonly Tensor[]
  /** Scalars by name that are summed over all stages and micro-batches without gradient. Their names must be listed in `RunOptions.metrics`. */
  readonly metrics?: Readonly<Record<string, Tensor>>
}

/** Options of `runSchedule`. */
export interface RunOptions {
  /** Shape and dtype of the activations between stages. */
  readonly activations: TensorLike
  /** Names of the metrics of all stages, the same on every rank. Default: none. */
  readonly metrics?: readonly string[] | undefined
  /** Arithmetic of matrix products. Default: f32. */
  readonly precision?: Precision | undefined
  /** Factor for losses and metrics. Default: 1. */
  readonly weight?: number | undefined
  /** Creates the function by which a pass reaches routed experts on other ranks. If given, stages with `inPieces` run it instead of `forward`. */
  readonly route?: ((pass: PiecewisePass) => RouteTokens) | undefined
  /** Called after each action of this rank. */
  readonly onAction?: ((action: Action) => void) | undefined
}

const names: OptionNames<RunOptions> = {
  activations: true,
  metrics: true,
  precision: true,
  weight: true,
  route: true,
  onAction: true,
}

/** A micro-batch between its forward pass and its last backward pass through a stage. */
interface InFlight {
  readonly pass: PiecewisePass
  input: Tensor | null
  /** The output for the next stage, if there is one, then the losses. */
  outputs: readonly Tensor[]
  /** Messages that still use its tensors. */
  readonly sending: Array<Promise<void>>
}

/**
 * Runs this rank's part of a step: the forward and backward passes of all micro-batches in the order of the schedule, each as soon as its inputs have arrived. Adds to
 * `.grad` of the stages' parameters; gradient norm, clipping and update are up to you. If the schedule has a stage on two ranks (DualPipe), call `sumReplicas` to sum their gradients.
 *
 * Sending and receiving overlap with computation. The two passes of an overlapped pair run at the same time: while one waits for a message or for experts on other ranks, the other
 * computes.
 * @param stages the stages that the schedule assigns to this rank (`stagesOf`), by number
 * @returns the sums of all losses and of each metric, `f32 []`, the same on every rank
 * @throws MoeError E_CONFIG if the schedule is invalid or for another number of ranks, or if a stage is missing, has no output for the next stage, or returns a metric that is not
 * listed
 */
export async function runSchedule(
  schedule: PipelineSchedule,
  ranks: Communicator,
  stages: ReadonlyMap<number, PipelineStage>,
  options: RunOptions,
): Promise<{ loss: Tensor; metrics: Record<string, Tensor> }> {
  checkOptions('runSchedule', options, names)
  const { activations, metrics = [], precision, weight = 1, route, onAction } = options
  checkSchedule(schedule)
  checkRank(schedule, ranks, stages)
  const messages = new StageMessages(schedule, ranks, activations)
  // A failure rejects `messages.take`, and is thrown again when `received` is awaited.
  const received = awaitedLater(messages.end())
  const last = schedule.stages - 1
  const inFlight = new Map<string, InFlight>()
  const freeing: Array<Promise<void>> = []
  const keyOf = ({ stage, microBatch }: StagePass) => `${stage} ${microBatch}`
  /** The passes of the current action. */
  let current: ReadonlyArray<Promise<void>> = []
  const zero = () => keep(zeros([], { backend: activations.backend }))
  let total = zero()
  const totals = new Map(metrics.map(name => [name, zero()]))

  const forward = async ({ stage, microBatch }: StagePass) => {
    const own: InFlight = { pass: new PiecewisePass({ precision }), input: null, outputs: [], sending: [] }
    inFlight.set(keyOf({ stage, microBatch }), own)
    const { pass } = own
    if (stage > 0) {
      const activation = await messages.take({ kind: 'activation', stage, microBatch })
      own.input = pass.input(activation)
      activation.dispose()
    }
    const run = stages.get(stage) as PipelineStage
    const part = await runStage(run, own.input, microBatch, pass, route)
    const { output, losses = [], metrics: measured = {} } = part
    if (stage < last) {
      if (output === undefined) throw noOutput(schedule, stage)
      own.sending.push(awaitedLater(messages.send(output, { kind: 'activation', stage: stage + 1, microBatch })))
    }
    for (const loss of losses) total = added(total, loss, weight)
    for (const [name, value] of Object.entries(measured)) {
      const before = totals.get(name)
      if (before === undefined) throw unknownMetric(schedule, stage, name)
      totals.set(name, added(before, value, weight))
    }
    own.outputs = stage < last ? [output as Tensor, ...losses] : losses
  }

  /** @param sent resolves when the messages have been sent that the schedule has before this one */
  const backwardToInput = async (part: StagePass, deferWeightGradients: boolean, sent?: Promise<void>) => {
    const { stage, microBatch } = part
    const { pass, input, outputs, sending } = inFlight.get(keyOf(part)) as InFlight
    const gradient = stage === last ? null : await messages.take({ kind: 'gradient', stage, microBatch })
    const ofLoss = () => pass.run(() => full([], weight, { backend: activations.backend }))
    await pass.backwardInput(
      outputs,
      outputs.map((_, i) => (i === 0 && gradient !== null ? gradient : ofLoss())),
      { deferWeightGradients },
    )
    gradient?.dispose()
    if (input === null) return
    // Zeros if the stage does not use its input.
    const inputGradient = pass.gradient(input) ?? pass.run(() => zeros(input.shape, { backend: input.backend }))
    await sent
    const gradientSent = messages.send(inputGradient, { kind: 'gradient', stage: stage - 1, microBatch })
    sending.push(awaitedLater(gradientSent.finally(() => inputGradient.dispose())))
  }

  const backwardToWeights = (part: StagePass) => {
    const { pass, sending } = inFlight.get(keyOf(part)) as InFlight
    pass.backwardWeight()
    inFlight.delete(keyOf(part))
    freeing.push(awaitedLater(Promise.all(sending).then(() => pass.dispose())))
  }

  const backward = async (part: StagePass, sent?: Promise<void>) => {
    await backwardToInput(part, false, sent)
    backwardToWeights(part)
  }

  /** Starts an action. @returns its passes, which resolve when they are done */
  const start = (action: Action): Array<Promise<void>> => {
    if (action.kind === 'overlapped') {
      const first = forward(action.forward)
      return [first, backward(action.backward, first)]
    }
    if (action.kind === 'forward') return [forward(action)]
    if (action.kind === 'backward') return [backward(action)]
    if (action.kind === 'backwardInput') return [backwardToInput(action, true)]
    backwardToWeights(action)
    return []
  }

  try {
    for (const action of schedule.ranks[ranks.rank]) {
      current = start(action)
      await Promise.all(current)
      onAction?.(action)
    }
    await Promise.all([received, ...freeing])
    const [loss, ...sums] = await ranks.allReduce([total, ...totals.values()])
    return { loss, metrics: Object.fromEntries(metrics.map((name, i) => [name, sums[i]])) }
  } finally {
    for (const sum of [total, ...totals.values()]) sum.dispose()
    // After a failure: free micro-batches in flight once no pass and no message uses them.
    for (const { pass, sending } of inFlight.values())
      void Promise.allSettled(current)
        .then(() => Promise.allSettled(sending))
        .then(() => pass.dispose())
    messages.discard()
  }
}

/** Runs the forward pass of a stage: in pieces if experts may be on other ranks. */
export function runStage(
  stage: PipelineStage,
  input: Tensor | null,
  microBatch: number,
  pass: PiecewisePass,
  route: RunOptions['route'],
): StageOutput | Promise<StageOutput> {
  return route !== undefined && stage.inPieces !== undefined
    ? stage.inPieces(input, microBatch, pass, route(pass))
    : inOnePiece(stage, input, microBatch, pass)
}

/** Runs `forward` of a stage as a single piece. */
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

/** Returns `total + weight * loss`, which the caller disposes of, and disposes of `total`. */
function added(total: Tensor, loss: Tensor, weight: number): Tensor {
  const life = new Lifetime()
  const sum = life.run(() => total.detach().add(weight === 1 ? loss.detach() : loss.detach().mul(weight)))
  sum.owner = null
  life.dispose()
  total.dispose()
  return sum
}

/** @throws MoeError E_CONFIG if the schedule is for another number of ranks */
export function checkSize(schedule: PipelineSchedule, ranks: Communicator): void {
  if (schedule.ranks.length === ranks.size) return
  const problem = `the schedule is for ${schedule.ranks.length} ranks, got ${ranks.size}`
  throw configError(schedule.name, problem, `create a schedule for ${ranks.size} ranks`)
}

function checkRank(schedule: PipelineSchedule, ranks: Communicator, stages: ReadonlyMap<number, PipelineStage>): void {
  checkSize(schedule, ranks)
  const missing = stagesOf(schedule, ranks.rank).filter(stage => !stages.has(stage))
  if (missing.length > 0)
    throw configError(
      schedule.name,
      `rank ${ranks.rank} is missing stage ${missing.join(', ')}`,
      `pass all of stagesOf(schedule, rank): ${stagesOf(schedule, ranks.rank).join(', ')}`,
    )
}

function unknownMetric(schedule: PipelineSchedule, stage: number, name: string): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: schedule.name,
    problem: `stage ${stage} returns the metric ${name}, which is not in options.metrics`,
    fix: 'list the metrics of all stages in { metrics }, the same on every rank',
  })
}

export function noOutput(schedule: PipelineSchedule, stage: number): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: schedule.name,
    problem: `stage ${stage} of ${schedule.stages} returns no output`,
    fix: 'return { output } from every stage but the last',
  })
}
