/** @file Ranks that train one model of `@moe/trainer` draw other numbers each, and go on exactly. */
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

/** With a layer that draws which second choices it uses. */
class Gshard extends DeepSeek {
  moe = new CapacityMoE(
    { hidden_size: 24, moe_intermediate_size: 8, n_routed_experts: 4, router: 'gshard' },
    { random: new Random(5), std: 1, backend },
  )
  /** Where the stream was after each step. */
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

/** Two ranks: where each drew, and what it has at the end. */
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

test('other numbers on each rank, where rank 0 draws as if it were alone', async () => {
  const own = new Random(5).fork('second expert')
  const [first, second] = await run()
  expect(first.drawn.map(({ stream }) => stream)).toEqual(Array(6).fill(own.stream))
  expect(second.drawn.map(({ stream }) => stream)).toEqual(Array(6).fill(own.fork('rank 1').stream))
  expect(second.drawn.map(({ position }) => position)).toEqual(first.drawn.map(({ position }) => position))
  expect(new Set(first.drawn.map(({ position }) => position)).size).toBe(6)
  // The run leaves the same model on both.
  expect(second.weights).toEqual(first.weights)
  expect([second.stream, second.position]).toEqual([own.stream, first.position])
  expect(backend.stats().handles).toBe(0)
})

test('a run goes on bit for bit', async () => {
  const [straight] = await run()
  await run({ out, checkpointEvery: 2, keepCheckpoints: 5 })
  const again = await run({ out, resume: join(out, 'checkpoints', 'step-000002'), keepCheckpoints: 5 })
  for (const { weights, drawn } of again) {
    expect(weights).toEqual(straight.weights)
    expect(drawn.map(({ position }) => position)).toEqual(straight.drawn.slice(2).map(({ position }) => position))
  }
})
