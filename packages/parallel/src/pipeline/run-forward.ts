/** @file Runs the forward passes of micro-batches through a pipeline, for an evaluation. */
import { keep, type Precision, type Tensor } from '@moe/core'
import type { Communicator, TensorLike } from '../communicator/communicator.ts'
import type { RouteTokens } from '../experts/expert-shards.ts'
import { PiecewisePass } from '../experts/piecewise-pass.ts'
import { Failure } from '../failure.ts'
import type { PipelineSchedule, StagePass } from '../schedule/schedule.ts'
import { noOutput, type PipelineStage, runStage } from './run-schedule.ts'
import { homesOf } from './stage-messages.ts'

/** Options of `runForward`. */
export interface ForwardOptions {
  /** Shape and dtype of the activations between stages, for each micro-batch. */
  readonly activations: readonly TensorLike[]
  /** Arithmetic of matrix products. Default: f32. */
  readonly precision?: Precision | undefined
  /** As in `RunOptions`. */
  readonly route?: ((pass: PiecewisePass) => RouteTokens) | undefined
}

/**
 * Runs this rank's part of the forward passes of micro-batches, of which there are at most as many as the schedule has. Stages run where the schedule runs them. Nothing is kept for a backward
 * pass, and several micro-batches are in the pipeline at the same time.
 * @param stages all stages, or the first ones
 * @returns the sum of the losses of each micro-batch; null if its last stage runs on another rank
 */
export async function runForward(
  schedule: PipelineSchedule,
  ranks: Communicator,
  stages: readonly PipelineStage[],
  { activations, precision, route }: ForwardOptions,
): Promise<Array<number | null>> {
  const homes = homesOf(schedule)
  const homeOf = (stage: number, microBatch: number) => homes.get(`${stage} ${microBatch}`)
  const last = stages.length - 1
  const losses = activations.map((): number | null => null)
  const sending: Array<Promise<void>> = []
  /** If a message cannot be sent, others that this rank waits for may not arrive. */
  const failure = new Failure()
  /** Outputs for the next stage that this rank also runs, by micro-batch. */
  const here = new Map<number, Tensor>()

  const take = async ({ stage, microBatch }: StagePass): Promise<Tensor> => {
    const own = here.get(microBatch)
    here.delete(microBatch)
    if (own !== undefined) return own
    const from = homeOf(stage - 1, microBatch) as number
    return keep(await Promise.race([ranks.receive(activations[microBatch], from), failure.promise]))
  }
  const pass = async ({ stage, microBatch }: StagePass): Promise<void> => {
    const own = new PiecewisePass({ precision, backward: false })
    try {
      let input: Tensor | null = null
      if (stage > 0) {
        const activation = await take({ stage, microBatch })
        input = own.input(activation)
        activation.dispose()
      }
      const { output, losses: found = [] } = await runStage(stages[stage], input, microBatch, own, route)
      if (stage === last) {
        const values = await Promise.all(found.map(loss => loss.item()))
        losses[microBatch] = values.reduce((sum, value) => sum + value, 0)
        return
      }
      if (output === undefined) throw noOutput(schedule, stage)
      const sent = keep(output.detach())
      const to = homeOf(stage + 1, microBatch) as number
      if (to === ranks.rank) here.set(microBatch, sent)
      else sending.push(failure.of(ranks.send(sent, to).finally(() => sent.dispose())))
    } finally {
      own.dispose()
    }
  }

  try {
    for (const part of passesOf(ranks.rank, stages.length, activations.length, homeOf)) await pass(part)
    await Promise.all(sending)
    return losses
  } finally {
    for (const tensor of here.values()) tensor.dispose()
  }
}

/**
 * The passes of a rank, in an order in which no rank waits for one that waits for it: every pass comes after the pass whose output it takes, and messages between two ranks are received in the
 * order in which they are sent.
 */
function passesOf(
  rank: number,
  stages: number,
  microBatches: number,
  homeOf: (stage: number, microBatch: number) => number | undefined,
): StagePass[] {
  const all = Array.from({ length: stages * microBatches }, (_, i) => ({
    stage: i % stages,
    microBatch: Math.floor(i / stages),
  }))
  return all
    .filter(({ stage, microBatch }) => homeOf(stage, microBatch) === rank)
    .sort((a, b) => a.stage + a.microBatch - b.stage - b.microBatch || a.stage - b.stage)
}
