/** @file Training of adapters on several ranks. */
import { addAdapters, namedAdapters, Random } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { TokenDataset, type TrainOptions, train } from '@moe/trainer'
import { afterAll, expect, test } from 'vitest'
import { type Communicator, ExpertParallel, local, oneForwardOneBackward, Pipeline } from './index.ts'

const backend = await createBackend()
afterAll(() => backend.dispose())

const config = { ...presets.tiny, vocab_size: 40, hidden_size: 24, num_hidden_layers: 2, num_nextn_predict_layers: 0 }
const source = new Random(3)
const training = TokenDataset.fromTokens([Int32Array.from({ length: 200 }, () => 2 + source.integer(38))])
const settings = {
  data: { training },
  steps: 6,
  sequenceLength: 8,
  lr: 5e-3,
  progress: false,
  handleSignals: false,
} as const

function adapted(): DeepSeek {
  const model = new DeepSeek(config, { seed: 1, backend })
  addAdapters(model, { rank: 4 })
  return model
}

async function run(options: Partial<TrainOptions>) {
  const model = adapted()
  await train(model, { ...settings, ...options })
  const learned = await Promise.all(
    namedAdapters(model).flatMap(({ adapter: { down, up } }) => [down.values(), up.values()]),
  )
  model.dispose()
  return learned
}

test('data parallelism trains the same adapters as one rank with the rows of both', async () => {
  const [first, second] = await local(2, ranks => run({ ranks, batchSize: 2 }))
  expect(second).toEqual(first)
  const alone = await run({ batchSize: 2, accumulate: 2 })
  for (const [i, values] of alone.entries()) {
    for (const [j, value] of values.entries()) expect(first[i][j]).toBeCloseTo(value, 4)
  }
  expect(backend.stats().handles).toBe(0)
})

test('pipeline and expert parallelism reject adapters', async () => {
  const expectRejection = async (parallelismOf: (model: DeepSeek, ranks: Communicator) => TrainOptions['ranks']) => {
    const messages = await local(2, async ranks => {
      const model = adapted()
      try {
        await train(model, { ...settings, batchSize: 2, ranks: parallelismOf(model, ranks) })
        return 'no error'
      } catch (error) {
        return (error as Error).message
      } finally {
        model.dispose()
      }
    })
    expect(messages[0]).toMatch(/adapters/)
    expect(messages[1]).toBe(messages[0])
    expect(backend.stats().handles).toBe(0)
  }
  await expectRejection((model, ranks) => new Pipeline(model, oneForwardOneBackward(2, 2), ranks))
  await expectRejection((model, ranks) => new ExpertParallel(model, ranks))
})
