/** @file For tests only: reinforcement learning of a small DeepSeek on one rank or several. As a program: a rank started by `mpirun`. With `--experts`, each rank has a part of the experts. With a folder as its argument, it saves checkpoints there, and the reward function of rank 1 fails after three steps. */
import { fileURLToPath } from 'node:url'
import type { Backend } from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { type Rollouts, rollouts, type TrainEvent, type TrainOptions } from '@moe/trainer'
import { ExpertParallel, mpi } from './index.ts'
import { report } from './mpi/test-launch.ts'
import { digestOf, type Trained, trainSmall } from './test-training.ts'

/** Prompts of several lengths. All completions of the last one have the same reward. */
export const prompts = Array.from({ length: 7 }, (_, i) => ({
  tokens: Array.from({ length: 2 + (i % 4) }, (_, t) => 2 + (((i + 1) * (t + 3)) % 38)),
  constantReward: i === 6,
}))

type RolloutOptions = Parameters<typeof rollouts<(typeof prompts)[number]>>[1]

/** Rollouts of up to six tokens, rewarded for the fraction of tokens below 20. */
export const smallRollouts = (options: Partial<RolloutOptions> = {}, from = prompts): Rollouts =>
  rollouts(from, {
    reward: ({ tokens, prompt }) =>
      prompt.constantReward ? 1 : tokens.filter(token => token < 20).length / tokens.length,
    groups: 3,
    groupSize: 4,
    maxTokens: 6,
    maxTexts: 32,
    ...options,
  }) as unknown as Rollouts

/** Trains with several micro-batches per step. Each row contains several packed texts. */
export function rewardSmall(
  backend: Backend,
  options: Partial<TrainOptions>,
  model: Parameters<typeof trainSmall>[2] = {},
): Promise<Trained> {
  const rows = { batchSize: 2, sequenceLength: 16, steps: 6, lr: 5e-3, schedule: () => 1 }
  return trainSmall(backend, { data: smallRollouts(), ...rows, ...options }, { end: 1, ...model })
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const ranks = await mpi()
  const [argument] = process.argv.slice(2)
  const sharded = argument === '--experts'
  const out = sharded ? undefined : argument
  let steps = 0
  const reward: RolloutOptions['reward'] = ({ tokens }) => {
    if (steps === 3 && ranks.rank === 1) throw new Error('no such server')
    return tokens.length
  }
  const onEvent = (event: TrainEvent) => {
    if (event.type === 'step') steps = event.step
  }
  const failing = out === undefined ? {} : { out, onEvent, data: smallRollouts({ reward }) }
  const trained = await rewardSmall(
    await createBackend({ threads: 1 }),
    sharded ? {} : { ranks, ...failing },
    sharded ? { onRanks: model => new ExpertParallel(model, ranks) } : {},
  )
  const rewards = trained.steps.map(({ metrics }) => metrics['reward'])
  report({ rank: ranks.rank, digest: digestOf(trained), rewards, stopped: trained.result.stopped })
  await ranks.close()
}
