/** @file For tests only: trains a small DeepSeek on one rank or several. As a program: a rank started by `mpirun`, which reports its losses and a digest of its weights. The arguments are the kind of parallelism (`data`, `pipeline` or `expert`) and what happens to rank 1 after its third step (`fail`, `terminate` or nothing). */
import { createHash } from 'node:crypto'
import { fileURLToPath } from 'node:url'
import { type Backend, deferWeights, Random, stateDict } from '@moe/core'
import { DeepSeek, type DeepSeekOptions, type LatentConfigInput, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { type LoadsEvent, type StepEvent, TokenDataset, type TrainOptions, type TrainResult, train } from '@moe/trainer'
import type { Communicator } from './communicator/communicator.ts'
import { ExpertParallel, mpi, Pipeline, zeroBubbleH1 } from './index.ts'
import { report } from './mpi/test-launch.ts'

export const smallConfig: LatentConfigInput = {
  ...presets.tiny,
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  moe_intermediate_size: 8,
  num_hidden_layers: 3,
  num_attention_heads: 2,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  q_lora_rank: 12,
  kv_lora_rank: 8,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  initializer_range: 0.3,
  num_nextn_predict_layers: 1,
}

/** Kinds of parallelism on two ranks, each with four micro-batches per step over all ranks. */
export const parallelisms = {
  data: { accumulate: 2, onRanks: (_: DeepSeek, ranks: Communicator) => ranks },
  pipeline: {
    accumulate: 4,
    onRanks: (model: DeepSeek, ranks: Communicator) => new Pipeline(model, zeroBubbleH1(ranks.size, 4), ranks),
  },
  expert: { accumulate: 2, onRanks: (model: DeepSeek, ranks: Communicator) => new ExpertParallel(model, ranks) },
}

/** 23 windows of 8 for three documents: with four rows per step, the last step of an epoch extends into the next, and some rows contain padding, so that ranks have different numbers of positions with a loss. */
export const smallData = () => {
  const random = new Random(3)
  const document = () => Int32Array.from({ length: 60 }, () => 2 + random.integer(38))
  return TokenDataset.fromTokens(Array.from({ length: 3 }, document))
}

type Ranks = TrainOptions['ranks']

export interface Trained {
  readonly result: TrainResult
  readonly steps: Array<Omit<StepEvent, 'tokensPerSecond'>>
  readonly loads: LoadsEvent[]
  readonly weights: Readonly<Record<string, readonly number[]>>
}

/** Trains a small model. Tests compare runs with 4 rows per step: `batchSize` 4, or 2 with two micro-batches, or 2 on two ranks. */
export async function trainSmall(
  backend: Backend,
  options: Partial<TrainOptions>,
  {
    mtp = 1,
    dense = false,
    end = null,
    kind = DeepSeek,
    deferred = false,
    onRanks,
    ...model
  }: DeepSeekOptions & {
    mtp?: number
    dense?: boolean
    /** The end-of-text token. */
    end?: number | null
    kind?: typeof DeepSeek
    /** Whether the weights are created only where a rank needs them. */
    deferred?: boolean
    onRanks?: (model: DeepSeek) => Ranks
  } = {},
): Promise<Trained> {
  const objective = { biasSpeed: 0.01, ...model.objective }
  const config = {
    ...smallConfig,
    num_nextn_predict_layers: mtp,
    eos_token_id: end,
    ...(dense ? { n_routed_experts: null, num_experts_per_tok: null } : {}),
  }
  const make = () => new kind(config, { seed: 1, backend, ...model, ...(model.balancer ? {} : { objective }) })
  const trainee = deferred ? deferWeights(make) : make()
  const steps: Trained['steps'] = []
  const loads: LoadsEvent[] = []
  const ranks = onRanks?.(trainee)
  try {
    const result = await train(trainee, {
      data: { training: smallData() },
      steps: 8,
      batchSize: 2,
      sequenceLength: 8,
      lr: 5e-3,
      progress: false,
      handleSignals: false,
      record: false,
      ...(ranks && { ranks }),
      ...options,
      onEvent(event, reporter) {
        if (event.type === 'step') {
          const { tokensPerSecond: _, ...step } = event
          steps.push(step)
        }
        if (event.type === 'loads') loads.push(event)
        return options.onEvent?.(event, reporter)
      },
    })
    if (ranks instanceof ExpertParallel || ranks instanceof Pipeline) await ranks.gather()
    const entries = stateDict(trainee).map(async ({ name, data }) => [name, Array.from(await data())] as const)
    return { result, steps, loads, weights: Object.fromEntries(await Promise.all(entries)) }
  } finally {
    if (ranks instanceof ExpertParallel || ranks instanceof Pipeline) ranks.dispose()
    trainee.dispose()
  }
}

/** A digest of the weights' bits. */
export function digestOf({ weights }: Pick<Trained, 'weights'>): string {
  const hash = createHash('sha256')
  for (const [name, values] of Object.entries(weights)) {
    hash.update(JSON.stringify([name, values.length])).update(Float64Array.from(values))
  }
  return hash.digest('hex')
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const ranks = await mpi()
  const [kind = 'data', action] = process.argv.slice(2)
  const { accumulate, onRanks } = parallelisms[kind as keyof typeof parallelisms]
  const options: Partial<TrainOptions> = {
    accumulate,
    handleSignals: true,
    onEvent: event => {
      if (ranks.rank !== 1 || event.type !== 'step' || event.step !== 3) return
      if (action === 'fail') throw new Error('rank 1 failed on purpose')
      if (action === 'terminate') process.kill(process.pid, 'SIGTERM')
    },
  }
  const model = { onRanks: (trainee: DeepSeek) => onRanks(trainee, ranks) }
  const trained = await trainSmall(await createBackend({ threads: 1 }), options, model)
  const losses = trained.steps.map(({ loss }) => loss)
  report({ rank: ranks.rank, digest: digestOf(trained), losses, stopped: trained.result.stopped })
  await ranks.close()
}
