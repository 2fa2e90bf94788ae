/**
 * Measures what overlapping forward and backward passes gains with expert parallelism: DualPipeV steps with its overlapped pairs, and with the pairs run one pass after the other.
 *
 *     node packages/parallel/src/pipeline/overlap.bench.ts [--stages 1] [--micro-batches 6] [--latency 0,1,2,5,10] [--rounds 5] [--tokens 128] [--layers 8]
 *
 * Two pipelines of `stages` ranks each share the experts. The benchmark simulates one core per rank and a message latency in milliseconds on clocks of its own. The two kinds of steps
 * alternate; the shortest time of each is printed.
 */
import { parseArgs } from 'node:util'
import { setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { localOver } from '../communicator/local.ts'
import { Clocks } from '../communicator/test-clocks.ts'
import { dualPipeV } from '../schedule/dual-pipe.ts'
import { type PipelineSchedule, partsOf } from '../schedule/schedule.ts'
import { Pipeline } from './pipeline.ts'

const { values } = parseArgs({
  options: {
    stages: { type: 'string', default: '1' },
    'micro-batches': { type: 'string', default: '6' },
    latency: { type: 'string', default: '0,1,2,5,10' },
    rounds: { type: 'string', default: '5' },
    tokens: { type: 'string', default: '128' },
    layers: { type: 'string', default: '8' },
  },
})
const [stages, rounds, tokens, layers] = [values.stages, values.rounds, values.tokens, values.layers].map(Number)
const latencies = values.latency.split(',').map(Number)
setDefaultBackend(await createBackend({ threads: 1 }))

const overlapped = dualPipeV(stages, Number(values['micro-batches']))
const sequential: PipelineSchedule = { ...overlapped, ranks: overlapped.ranks.map(actions => actions.flatMap(partsOf)) }
const config = {
  ...presets.tiny,
  vocab_size: 256,
  num_hidden_layers: layers,
  first_k_dense_replace: 0,
  num_nextn_predict_layers: 0,
}
const clocks = new Clocks(2 * stages)

const times = await localOver(
  2 * stages,
  transport => clocks.through(transport),
  async ranks => {
    const batches = Array.from({ length: overlapped.microBatches }, (_, m) => ({
      tokens: Int32Array.from({ length: tokens }, (_, i) => (7 * m + 3 * i + i * i) % 256),
      documents: new Int32Array(tokens),
      rows: 1,
      length: tokens,
    }))
    const pipelines = [sequential, overlapped].map(schedule => {
      const model = new DeepSeek(config, { seed: 1, objective: { balanceWeight: 0 } })
      return new Pipeline(model, schedule, ranks, { expertParallelSize: 2 })
    })
    const found: number[][] = []
    for (const latency of latencies) {
      await ranks.barrier()
      clocks.latency = latency
      const shortest = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY]
      for (let round = 0; round < rounds; round++) {
        for (const [i, pipeline] of pipelines.entries()) {
          await ranks.barrier()
          const begun = clocks.now(ranks.rank)
          await pipeline.step(batches)
          shortest[i] = Math.min(shortest[i], clocks.now(ranks.rank) - begun)
        }
      }
      found.push(shortest)
    }
    return found
  },
)

console.log('latency (ms) | sequential (ms) | overlapped (ms) | overlapped / sequential')
for (const [i, latency] of latencies.entries()) {
  const [one, both] = times[0][i]
  console.log([latency, one.toFixed(0), both.toFixed(0), (both / one).toFixed(2)].join(' | '))
}
