/** @file Evaluations and checkpoints of a model whose parts are on several ranks, without the whole model on any. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { DeepSeek } from '@moe/deepseek'
import { evaluate, type TokenBatch, TokenDataset, type TrainOptions } from '@moe/trainer'
import { expect, test } from 'vitest'
import { type Communicator, dualPipe, dualPipeV, ExpertParallel, local, Pipeline, zeroBubbleH1 } from './index.ts'
import { backend, temporaryFolder } from './test-runs.ts'
import { digestOf, trainSmall } from './test-training.ts'

const document = (n: number, length: number) => Int32Array.from({ length }, (_, i) => 2 + ((i * i * n + 3 * i) % 38))
const training = TokenDataset.fromTokens([1, 2, 3].map(n => document(n, 60)))
/** An odd number of batches, whose sizes differ. */
const validation = {
  one: TokenDataset.fromTokens([document(5, 75)]),
  other: TokenDataset.fromTokens([document(7, 31)]),
}
const sizes = { sequenceLength: 8, batchSize: 2 }

type Parts = (model: DeepSeek, ranks: Communicator) => ExpertParallel<TokenBatch> | Pipeline<TokenBatch>

const kinds: Array<[string, number, number, Parts]> = [
  ['experts on two ranks', 2, 1, (model, ranks) => new ExpertParallel(model, ranks)],
  ['experts on four ranks', 4, 1, (model, ranks) => new ExpertParallel(model, ranks)],
  [
    'experts on two pairs of ranks',
    4,
    1,
    (model, ranks) => new ExpertParallel(model, ranks, { expertParallelSize: 2 }),
  ],
  ['a pipeline', 2, 4, (model, ranks) => new Pipeline(model, zeroBubbleH1(2, 4), ranks)],
  ['a pipeline with one rank per layer', 5, 4, (model, ranks) => new Pipeline(model, zeroBubbleH1(5, 4), ranks)],
  ['a pipeline with DualPipe', 2, 4, (model, ranks) => new Pipeline(model, dualPipe(2, 4), ranks)],
  ['two pipelines with DualPipeV', 4, 4, (model, ranks) => new Pipeline(model, dualPipeV(2, 4), ranks)],
  [
    'pipelines with sharded experts',
    4,
    2,
    (model, ranks) => new Pipeline(model, zeroBubbleH1(2, 2), ranks, { expertParallelSize: 2 }),
  ],
]

test.each(kinds)(
  'an evaluation on parts equals that of the whole model, and a checkpoint is that of the whole model: %s',
  async (label, size, accumulate, partsOf) => {
    const out = await temporaryFolder()
    const run = (
      more: (ranks: Communicator, model: () => DeepSeek, parts: () => ReturnType<Parts>) => Partial<TrainOptions>,
    ) =>
      local(size, ranks => {
        let parts: ReturnType<Parts> | undefined
        let model: DeepSeek | undefined
        const options = {
          ...{ data: { training, validation }, steps: 4, evalEvery: 2, accumulate },
          ...more(
            ranks,
            () => model as DeepSeek,
            () => parts as ReturnType<Parts>,
          ),
        }
        const onRanks = (made: DeepSeek) => {
          model = made
          parts = partsOf(made, ranks)
          return parts
        }
        return trainSmall(backend, options, { onRanks })
      })
    const compared: number[] = []
    const gathering = await run((ranks, model, parts) => ({
      out,
      onEvent: async event => {
        if (event.type !== 'evaluation') return
        // All ranks have the whole model, and training continues.
        await parts().gather()
        const whole = await evaluate(model(), validation, sizes)
        expect(event.tokens).toBe(whole.tokens)
        // Experts on other ranks are added up in another order.
        const near = (loss = Number.NaN) => (label.includes('experts') ? expect.closeTo(loss, 6) : loss)
        for (const name of ['one', 'other'])
          expect(event.sources?.[name].loss).toEqual(near(whole.sources?.[name].loss))
        compared.push(ranks.rank)
        if (!event.final) return
        const folder = await temporaryFolder()
        await model().save(folder)
        const saved = join(out, 'checkpoints', 'step-000004', 'model')
        for (const file of ['model.safetensors', 'config.json'])
          expect(await readFile(join(saved, file))).toEqual(await readFile(join(folder, file)))
      },
    }))
    expect(compared).toHaveLength(2 * size)
    const plain = await run(() => ({}))
    for (const each of gathering) expect(digestOf(each)).toBe(digestOf(plain[0]))
  },
)
