/**
 * Measures what sharding the optimizer state (ZeRO-1) changes: seconds per step and memory per rank, compared to ranks that each hold all of it. The two alternate.
 *
 *     mpirun -np 2 node packages/parallel/src/sharded-optimizer.bench.ts [--rounds 3] [--precision bf16] [--vocabulary 4096]
 */
import { parseArgs } from 'node:util'
import { type Precision, parameterCount, Random } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { type Ranks, TokenDataset, train } from '@moe/trainer'
import { mpi } from './index.ts'

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    precision: { type: 'string', default: 'bf16' },
    vocabulary: { type: 'string', default: '4096' },
  },
})
const [rounds, vocabulary] = [values.rounds, values.vocabulary].map(Number)
const ranks = await mpi()
const { rank, size } = ranks
const unsharded: Ranks = {
  rank,
  size,
  allReduce: tensors => ranks.allReduce(tensors),
  allReduceInPlace: tensors => ranks.allReduceInPlace(tensors),
  allGather: tensor => ranks.allGather(tensor),
}
const random = new Random(3)
const training = TokenDataset.fromTokens([Int32Array.from({ length: 40_000 }, () => random.integer(vocabulary))])

interface Measured {
  readonly seconds: number[]
  bytes: number
  peakBytes: number
  parameters: number
}

async function measure(ranks: Ranks, record: boolean, into: Measured): Promise<void> {
  const backend = await createBackend({ threads: 1 })
  const model = new DeepSeek({ ...presets.tiny, vocab_size: vocabulary }, { seed: 1, backend })
  into.parameters = parameterCount(model)
  const precision = values.precision as Precision
  await train(model, {
    data: { training },
    ranks,
    record,
    precision,
    steps: 12,
    batchSize: 2,
    sequenceLength: 128,
    progress: false,
    onEvent(event) {
      // The first steps load kernels and are recorded.
      if (event.type !== 'step' || event.step < 4) return
      into.seconds.push((2 * 128 * size) / event.tokensPerSecond)
      const { bytes, peakBytes } = backend.stats()
      Object.assign(into, { bytes, peakBytes })
    },
  })
  model.dispose()
  backend.dispose()
}

const inMegabytes = (bytes: number) => (bytes / 1e6).toFixed(1)

for (const record of [false, true]) {
  const measured = { sharded: [ranks, empty()], unsharded: [unsharded, empty()] } as const
  for (let round = 0; round < rounds; round++)
    for (const [way, into] of Object.values(measured)) await measure(way, record, into)
  for (const [way, [, { seconds, bytes, peakBytes, parameters }]] of Object.entries(measured)) {
    seconds.sort((a, b) => a - b)
    const [least, median] = [seconds[0], seconds[seconds.length >> 1]].map(time => time.toFixed(3))
    const memory = `${inMegabytes(bytes)} MB between steps, peak ${inMegabytes(peakBytes)} MB`
    const what = `rank ${rank}, ${(parameters / 1e6).toFixed(1)}M parameters, ${record ? 'recorded' : 'op by op'}, ${way}`
    console.log(`${what}: median ${median} s per step, minimum ${least} s; ${memory}`)
  }
}
await ranks.close()

function empty(): Measured {
  return { seconds: [], bytes: 0, peakBytes: 0, parameters: 0 }
}
