/** @file Random streams of ranks that train one model: each rank draws different numbers, and a resumed run continues the streams. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { namedParameters, Random, type Tensor } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { CapacityMoE } from '@moe/router'
import { TokenDataset, type TrainOptions, train } from '@moe/trainer'
import { afterAll, expect, test } from 'vitest'
import { local } from './index.ts'

const backend = await createBackend()
const out = await mkdtemp(join(tmpdir(), 'moe-draws-'))
afterAll(async () => {
  backend.dispose()
  await rm(out, { recursive: true })
})

const config = { ...presets.tiny, vocab_size: 40, hidden_size: 24, num_hidden_layers: 1, num_nextn_predict_layers: 0 }
const source = new Random(3)
const training = TokenDataset.fromTokens([Int32Array.from({ length: 200 }, () => 2 + source.integer(38))])

/** A model with a layer that decides at random which second experts it uses. */
class Gshard extends DeepSeek {
  moe = new CapacityMoE(
    { hidden_size: 24, moe_intermediate_size: 8, n_routed_experts: 4, router: 'gshard' },
    { random: new Random(5), std: 1, backend },
  )
  /** The state of the stream after each step. */
  readonly drawn: Array<{ stream: number; position: number }> = []

  override hidden(...[ids, options = {}]: Parameters<DeepSeek['hidden']>): Tensor {
    const hidden = super.hidden(ids, options)
    return hidden.add(this.moe.forward(hidden, { training: options.training }))
  }

  override afterStep(...sum: Parameters<DeepSeek['afterStep']>): Promise<Record<string, number>> {
    const { stream, position } = this.moe.random
    this.drawn.push({ stream, position })
    this.moe.reset()
    return super.afterStep(...sum)
  }
}

/** Trains on two ranks. Returns for each the states of its stream and the final weights. */
const run = (options: Partial<TrainOptions> = {}) =>
  local(2, async ranks => {
    const model = new Gshard(config, { seed: 1, backend })
    const quiet = { progress: false, handleSignals: false, schedule: () => 1 } as const
    const settings = { data: { training }, steps: 6, batchSize: 2, sequenceLength: 8, lr: 5e-3, ...quiet }
    await train(model, { ...settings, ranks, ...options })
    const weights = await Promise.all(
      namedParameters(model).map(async ({ parameter }) => [...(await parameter.values())]),
    )
    const { stream, position } = model.moe.random
    model.dispose()
    return { drawn: model.drawn, weights, stream, position }
  })

test('each rank has its own stream, and rank 0 has that of a training without ranks', async () => {
  const own = new Random(5).fork('second expert')
  const [first, second] = await run()
  expect(first.drawn.map(({ stream }) => stream)).toEqual(Array(6).fill(own.stream))
  expect(second.drawn.map(({ stream }) => stream)).toEqual(Array(6).fill(own.fork('rank 1').stream))
  expect(second.drawn.map(({ position }) => position)).toEqual(first.drawn.map(({ position }) => position))
  expect(new Set(first.drawn.map(({ position }) => position)).size).toBe(6)
  // Both ranks end with the same model.
  expect(second.weights).toEqual(first.weights)
  expect([second.stream, second.position]).toEqual([own.stream, first.position])
  expect(backend.stats().handles).toBe(0)
})

test('a resumed run continues the streams, and gives the same bits', async () => {
  const [straight] = await run()
  await run({ out, checkpointEvery: 2, keepCheckpoints: 5 })
  const resumed = await run({ out, resume: join(out, 'checkpoints', 'step-000002'), keepCheckpoints: 5 })
  for (const { weights, drawn } of resumed) {
    expect(weights).toEqual(straight.weights)
    expect(drawn.map(({ position }) => position)).toEqual(straight.drawn.slice(2).map(({ position }) => position))
  }
})
