/**
 * Measures the peak memory of each rank, in units of the whole model's weights, when it creates a model, trains it, evaluates it, saves it and resumes from a checkpoint:
 *
 *     node packages/parallel/src/memory-per-rank.bench.ts
 */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { deferWeights, namedParameters, Random } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { TokenDataset, type TrainOptions, train } from '@moe/trainer'
import type { Communicator } from './communicator/communicator.ts'
import { dualPipeV, ExpertParallel, local, oneForwardOneBackward, Pipeline } from './index.ts'

const config = {
  ...presets.tiny,
  vocab_size: 512,
  hidden_size: 96,
  moe_intermediate_size: 256,
  n_routed_experts: 16,
  num_hidden_layers: 16,
  num_nextn_predict_layers: 0,
}
const random = new Random(3)
const tokens = () => TokenDataset.fromTokens([Int32Array.from({ length: 600 }, () => random.integer(512))])
const data = { training: tokens(), validation: tokens() }

const kinds = {
  'expert parallelism': (model: DeepSeek, ranks: Communicator) => new ExpertParallel(model, ranks),
  'a pipeline with 1F1B': (model: DeepSeek, ranks: Communicator) =>
    new Pipeline(model, oneForwardOneBackward(ranks.size, 2 * ranks.size), ranks),
  'a pipeline with DualPipeV': (model: DeepSeek, ranks: Communicator) =>
    new Pipeline(model, dualPipeV(ranks.size, 2 * ranks.size), ranks),
}

interface Peaks {
  readonly weights: number
  readonly whole: number
  readonly created: number
  readonly peak: number
}

/** Trains on `size` ranks, each with a backend of its own. */
function measure(kind: keyof typeof kinds, size: number, options: Partial<TrainOptions> | null): Promise<Peaks[]> {
  return local(size, async ranks => {
    const backend = await createBackend({ threads: 1 })
    const model = deferWeights(() => new DeepSeek(config, { seed: 1, backend }))
    const parts = kinds[kind](model, ranks)
    await parts.synchronize()
    const created = backend.stats().peakBytes
    const bytesOf = (all: ReturnType<typeof namedParameters>) =>
      all.reduce((sum, { parameter }) => sum + 4 * parameter.size, 0)
    const weights = bytesOf([...parts.parameters])
    if (options !== null)
      await train(model, {
        data,
        ranks: parts,
        steps: 2,
        batchSize: 1,
        sequenceLength: 16,
        accumulate: kind === 'expert parallelism' ? 1 : 2 * size,
        progress: false,
        handleSignals: false,
        ...options,
      })
    const { peakBytes: peak } = backend.stats()
    parts.dispose()
    model.dispose()
    backend.dispose()
    return { weights, whole: bytesOf(namedParameters(model)), created, peak }
  })
}

console.log(
  'ranks                            own  create  train  evaluate   save  resume  (1 = weights of the whole model)',
)
for (const kind of Object.keys(kinds) as Array<keyof typeof kinds>) {
  for (const size of [2, 4, 8]) {
    const out = await mkdtemp(join(tmpdir(), 'moe-memory-'))
    const withoutEvaluation = { training: data.training }
    const runs = [
      await measure(kind, size, null),
      await measure(kind, size, { data: withoutEvaluation }),
      await measure(kind, size, {}),
      await measure(kind, size, { data: withoutEvaluation, out }),
      await measure(kind, size, {
        data: withoutEvaluation,
        out,
        resume: true,
        steps: 3,
        allowChanges: true,
      }),
    ]
    const most = (of: (peaks: Peaks) => number, run: readonly Peaks[]) =>
      Math.max(...run.map(peaks => of(peaks) / peaks.whole)).toFixed(2)
    const columns = [most(({ weights }) => weights, runs[0]), ...runs.map(run => most(({ peak }) => peak, run))]
    console.log(`${size} ${kind}`.padEnd(30), ...columns.map(text => text.padStart(7)))
    await rm(out, { recursive: true })
  }
}
