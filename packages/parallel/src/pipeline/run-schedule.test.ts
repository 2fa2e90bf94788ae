/** @file Errors of `runSchedule`, for missing stages and failing ranks. pipeline.test.ts tests its results. */
import { type Backend, type MoeError, setDefaultBackend, type Tensor, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { beforeEach, describe, expect, test } from 'vitest'
import type { Communicator } from '../communicator/communicator.ts'
import { local, localOver } from '../communicator/local.ts'
import type { Transport } from '../communicator/transport.ts'
import { dualPipeV } from '../schedule/dual-pipe.ts'
import { oneForwardOneBackward } from '../schedule/one-f-one-b.ts'
import { stagesOf } from '../schedule/schedule.ts'
import { zeroBubbleH1 } from '../schedule/zero-bubble.ts'
import { runForward } from './run-forward.ts'
import { type PipelineStage, runSchedule } from './run-schedule.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

describe('runSchedule', () => {
  test('rejects a wrong number of ranks, missing stages, a stage without output and an unknown metric', async () => {
    const schedule = oneForwardOneBackward(2, 2)
    const activations = { shape: [1], dtype: 'f32' } as const
    const stage = { forward: () => ({}) }
    const message = (size: number, stages: Map<number, PipelineStage>) =>
      local(size, ranks => runSchedule(schedule, ranks, stages, { activations })).catch(
        (error: MoeError) => error.message,
      )
    expect(await message(3, new Map())).toMatch(/for 2 ranks, got 3/)
    expect(await message(2, new Map([[1, stage]]))).toMatch(/rank 0 is missing stage 0/)
    expect(
      await message(
        2,
        new Map([
          [0, stage],
          [1, stage],
        ]),
      ),
    ).toMatch(/stage 0 of 2 returns no output/)
    const measuring = { forward: () => ({ output: tensor([1]), metrics: { seen: tensor([1], []) } }) }
    expect(
      await message(
        2,
        new Map([
          [0, measuring],
          [1, stage],
        ]),
      ),
    ).toMatch(/stage 0 returns the metric seen, which is not in options\.metrics/)
  })

  test.each([
    ['in its first pass', zeroBubbleH1(2, 3), 0],
    ['in an overlapped pair of passes', dualPipeV(2, 5), 3],
  ])('ends all ranks if one fails %s, and throws its error', async (_, schedule, failsAt) => {
    const before = backend.stats().handles
    const last = schedule.stages - 1
    const stageOf = (rank: number, stage: number): PipelineStage => ({
      forward(input, microBatch) {
        if (rank === 1 && microBatch === failsAt) throw new RangeError('the last straw')
        const output = (input ?? tensor([1])).mul(2)
        return stage < last ? { output } : { losses: [output.sum()] }
      },
    })
    const step = local(2, ranks => {
      const stages = stagesOf(schedule, ranks.rank).map(stage => [stage, stageOf(ranks.rank, stage)] as const)
      return runSchedule(schedule, ranks, new Map(stages), { activations: { shape: [1], dtype: 'f32' } })
    })
    await expect(step).rejects.toThrow('the last straw')
    // Micro-batches in flight are freed once their messages have been sent.
    await expect.poll(() => backend.stats().handles).toBe(before)
  })

  test('a message that cannot be sent rejects the step, and nothing else', async () => {
    const schedule = oneForwardOneBackward(2, 3)
    const activations = { shape: [1], dtype: 'f32' } as const
    const stages: PipelineStage[] = [
      { forward: () => ({ output: tensor([1]) }) },
      { forward: input => ({ losses: [(input as Tensor).sum()] }) },
    ]
    const unplugged = (transport: Transport): Transport => ({
      rank: transport.rank,
      size: transport.size,
      send: () => Promise.reject(new Error('no network')),
      receive: (...message) => transport.receive(...message),
      close: () => transport.close(),
    })
    const run = (work: (ranks: Communicator) => Promise<unknown>) => localOver(2, unplugged, work)
    const step = run(ranks =>
      runSchedule(schedule, ranks, new Map([[ranks.rank, stages[ranks.rank]]]), { activations }),
    )
    await expect(step).rejects.toThrow('no network')
    const forward = run(ranks => runForward(schedule, ranks, stages, { activations: [activations, activations] }))
    await expect(forward).rejects.toThrow('no network')
  })
})
