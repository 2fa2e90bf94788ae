/** @file `mpirun -np 2 node src/shared-optimizer.bench.ts [rounds]`: seconds of a step and memory of each rank, with the optimizer shared out and with all of it on every rank, in turns. */
import { namedParameters, Random } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { TokenDataset, type TrainOptions, train } from '@moe/trainer'
import { mpi } from './index.ts'

const ranks = await mpi()
const rounds = Number(process.argv[2] ?? 3)
const apart = {
  rank: ranks.rank,
  size: ranks.size,
  allReduce: ranks.allReduce.bind(ranks),
  allReduceInPlace: ranks.allReduceInPlace.bind(ranks),
  allGather: ranks.allGather.bind(ranks),
}
const random = new Random(3)
const training = TokenDataset.fromTokens([Int32Array.from({ length: 40_000 }, () => random.integer(4096))])
const ways = { shared: ranks, whole: apart }
const seconds: Record<string, number[]> = { shared: [], whole: [] }
const memory: Record<string, { bytes: number; peak: number }> = {}

async function run(way: keyof typeof ways, options: Partial<TrainOptions>): Promise<void> {
  const backend = await createBackend({ threads: 1 })
  const model = new DeepSeek({ ...presets.tiny, vocab_size: 4096 }, { seed: 1, backend })
  await train(model, {
    data: { training },
    ranks: ways[way],
    steps: 12,
    batchSize: 2,
    sequenceLength: 128,
    progress: false,
    ...options,
    onEvent(event) {
      if (event.type !== 'step' || event.step < 4) return
      seconds[way].push((2 * 128 * ranks.size) / event.tokensPerSecond)
      const { bytes, peakBytes } = backend.stats()
      memory[way] = { bytes, peak: peakBytes }
    },
  })
  if (ranks.rank === 0 && rounds === seconds[way].length / 9)
    console.log(
      way,
      namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0),
      'numbers',
    )
  model.dispose()
  backend.dispose()
}

const median = (of: number[]) => of.sort((a, b) => a - b)[Math.floor(of.length / 2)]
for (const record of [false, true]) {
  for (const way of ['shared', 'whole'] as const) seconds[way] = []
  for (let round = 0; round < rounds; round++)
    for (const way of ['shared', 'whole'] as const) await run(way, { record, precision: 'bf16' })
  for (let rank = 0; rank < ranks.size; rank++) {
    if (rank === ranks.rank)
      for (const way of ['shared', 'whole'] as const) {
        const { bytes, peak } = memory[way]
        const mb = (n: number) => (n / 1e6).toFixed(1)
        console.log(
          `rank ${rank}, ${record ? 'recorded' : 'op by op'}, ${way}: ${median(seconds[way]).toFixed(3)} s a step, ${mb(bytes)} MB, at most ${mb(peak)} MB`,
        )
      }
    await ranks.barrier()
  }
}
await ranks.close()
