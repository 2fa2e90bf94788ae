/** @file A DeepSeek model in stages, by every schedule, beside the whole model on one rank. */
import { type Backend, backward, type MoeError, scope, setDefaultBackend, tensor, trainable } from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import { beforeEach, describe, expect, test } from 'vitest'
import { local } from '../communicator/local.ts'
import { dualPipe, dualPipeV } from '../schedule/dual-pipe.ts'
import { interleaved, oneForwardOneBackward } from '../schedule/one-f-one-b.ts'
import type { Schedule } from '../schedule/schedule.ts'
import { zeroBubbleH1, zeroBubbleH2, zeroBubbleV } from '../schedule/zero-bubble.ts'
import { type PipelineStage, runSchedule } from './run-schedule.ts'
import { gradientsOf, newModel, Stage, stagesOfRank, step } from './test-stages.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

/** Loss and gradients of the whole model, all micro-batches one after the other. */
function whole(microBatches: number) {
  const model = newModel()
  const stage = new Stage(model, 0, 1, microBatches)
  let loss = 0
  for (let m = 0; m < microBatches; m++)
    scope(() => {
      const sum = stage.forward(null, m).losses.reduce((a, b) => a.add(b))
      loss += readF64(sum)[0]
      backward(sum)
    })
  return {
    loss,
    of: (n: number, stages: number) => gradientsOf(new Stage(model, n, stages, microBatches).parameters),
  }
}

const schedules: Schedule[] = [
  oneForwardOneBackward(1, 2),
  oneForwardOneBackward(4, 6),
  interleaved(2, 4, 2),
  zeroBubbleH1(4, 6),
  zeroBubbleH2(2, 4),
  zeroBubbleV(2, 4),
  dualPipe(4, 8),
  dualPipeV(2, 5),
]

describe('a step in stages', () => {
  test.each(schedules.map(schedule => [`${schedule.name}, ${schedule.ranks.length} ranks`, schedule] as const))(
    '%s: loss and gradients of the whole model, nothing left behind',
    async (_, schedule) => {
      const { stages, microBatches } = schedule
      const expected = whole(microBatches)
      /** Handles that all ranks together hold after each step. */
      const held: number[] = []
      await local(schedule.ranks.length, async ranks => {
        const { model, own } = stagesOfRank(schedule, ranks)
        for (let round = 0; round < 2; round++) {
          expect(await step(schedule, ranks, own)).toBeCloseTo(expected.loss, 5)
          for (const [n, { parameters }] of own) {
            // The order of sums differs, and what goes between ranks is rounded to f32.
            const wanted = expected.of(n, stages).map(gradient => gradient?.map(x => expect.closeTo(x, 5)) ?? null)
            expect(gradientsOf(parameters)).toEqual(wanted)
          }
          for (const parameter of trainable(model)) parameter.zeroGrad()
          await ranks.barrier()
          held.push(backend.stats().handles)
          await ranks.barrier()
        }
      })
      expect(new Set(held).size).toBe(1)
    },
  )

  test('what a schedule gives a rank must be there, and be used by as many ranks', async () => {
    const schedule = oneForwardOneBackward(2, 2)
    const between = { shape: [1], dtype: 'f32' } as const
    const stage = { forward: () => ({}) }
    const message = (size: number, stages: Map<number, PipelineStage>) =>
      local(size, ranks => runSchedule(schedule, ranks, stages, { between })).catch((error: MoeError) => error.message)
    expect(await message(3, new Map())).toMatch(/for 2 ranks, there are 3/)
    expect(await message(2, new Map([[1, stage]]))).toMatch(/rank 0 has no stage 0/)
    expect(
      await message(
        2,
        new Map([
          [0, stage],
          [1, stage],
        ]),
      ),
    ).toMatch(/stage 0 of 2 has no output/)
  })

  test('a rank that fails in its pass ends the others', async () => {
    const schedule = zeroBubbleH1(2, 3)
    const failing: PipelineStage = {
      forward() {
        throw new RangeError('the last straw')
      },
    }
    const before = backend.stats().handles
    const passing: PipelineStage = { forward: () => ({ output: tensor([1]) }) }
    const step = local(2, ranks =>
      runSchedule(schedule, ranks, new Map([[ranks.rank, ranks.rank === 0 ? passing : failing]]), {
        between: { shape: [1], dtype: 'f32' },
      }),
    )
    await expect(step).rejects.toThrow('the last straw')
    // What was under way goes when its messages have.
    await expect.poll(() => backend.stats().handles).toBe(before)
  })
})
