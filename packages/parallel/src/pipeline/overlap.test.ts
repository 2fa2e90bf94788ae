/** @file Overlapping forward and backward passes with expert parallelism: in whatever order messages arrive, there is no deadlock, and the results are the same. */
import { type Backend, Random, setDefaultBackend } from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, expect, test } from 'vitest'
import type { Communicator } from '../communicator/communicator.ts'
import { localOver } from '../communicator/local.ts'
import { DelayedTransport } from '../communicator/test-delays.ts'
import { dualPipe, dualPipeV } from '../schedule/dual-pipe.ts'
import type { PipelineSchedule } from '../schedule/schedule.ts'
import { batchesOf, newModel } from '../test-steps.ts'
import { Pipeline } from './pipeline.ts'

const cpu: Backend = await createBackend({ threads: 1 })
setDefaultBackend(cpu)
afterAll(() => cpu.dispose())

async function step(schedule: PipelineSchedule, ranks: Communicator): Promise<unknown> {
  const model = newModel({ num_hidden_layers: 4, first_k_dense_replace: 1, num_nextn_predict_layers: 1 })
  const pipeline = new Pipeline(model, schedule, ranks, { expertParallelSize: 2 })
  const { rank, world } = pipeline.dataShard
  const batches = batchesOf(world * schedule.microBatches, model).filter((_, m) => m % world === rank)
  const { loss, gradNorm } = await pipeline.step(batches)
  const gradients = pipeline.parameters.map(async ({ name, parameter }) => [name, await parameter.grad?.values()])
  const found = { loss, gradNorm, gradients: await Promise.all(gradients) }
  pipeline.dispose()
  model.dispose()
  return found
}

test.each([
  ['DualPipe', dualPipe(2, 4), 4],
  ['DualPipeV', dualPipeV(2, 4), 4],
  ['DualPipeV on one rank', dualPipeV(1, 4), 4],
] as const)('%s gives the same bits if messages are delayed at random', async (_, schedule, size) => {
  const run = (seed: number) => {
    const random = new Random(seed)
    // Some messages overtake others, and some arrive after all computation that does not depend on them.
    const delay = () => [0, 0.1, 2, 5][random.integer(4)] * (seed > 0 ? 1 : 0)
    return localOver(
      size,
      transport => new DelayedTransport(transport, delay),
      ranks => step(schedule, ranks),
    )
  }
  const expected = await run(0)
  for (let seed = 1; seed <= 4; seed++) expect(await run(seed)).toEqual(expected)
})
