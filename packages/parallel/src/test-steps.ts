/** @file For tests only: a small DeepSeek, micro-batches for it, and training steps on one rank, with pipeline parallelism and with expert parallelism. */
import { createHash } from 'node:crypto'
import { backward, type NamedParameter, namedParameters, scope } from '@moe/core'
import { readF64 } from '@moe/core/reference'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions, presets } from '@moe/deepseek'
import type { Communicator } from './communicator/communicator.ts'
import { ExpertParallel } from './experts/expert-parallel.ts'
import type { ParallelStepResult } from './gradients.ts'
import { Pipeline } from './pipeline/pipeline.ts'
import { dualPipe, dualPipeV } from './schedule/dual-pipe.ts'
import { zeroBubbleH1 } from './schedule/zero-bubble.ts'

/** Two dense layers, six MoE layers, and two MTP modules that share embedding and head. */
const config: DeepSeekConfigInput = {
  ...presets.tiny,
  vocab_size: 20,
  hidden_size: 8,
  intermediate_size: 12,
  moe_intermediate_size: 4,
  num_hidden_layers: 8,
  num_attention_heads: 2,
  first_k_dense_replace: 2,
  n_routed_experts: 4,
  num_experts_per_tok: 2,
  n_group: 2,
  topk_group: 1,
  q_lora_rank: 6,
  kv_lora_rank: 4,
  qk_nope_head_dim: 4,
  qk_rope_head_dim: 2,
  v_head_dim: 4,
  num_nextn_predict_layers: 2,
  initializer_range: 0.3,
}

export type Changes = Partial<DeepSeekConfigInput>

export const newModel = (changes: Changes = {}, { objective, ...options }: DeepSeekOptions = {}) =>
  new DeepSeek({ ...config, ...changes } as DeepSeekConfigInput, {
    seed: 1,
    objective: { balanceWeight: 0.01, biasSpeed: 0.01, ...objective },
    ...options,
  })

/** Micro-batches of two rows of four positions, with several documents and padding, so that they have different numbers of positions with a loss. */
export const batchesOf = (microBatches: number, { lookahead }: DeepSeek) => {
  const [rows, length] = [2, 4 + lookahead]
  return Array.from({ length: microBatches }, (_, m) => ({
    tokens: Int32Array.from({ length: rows * length }, (_, i) => (7 * m + 3 * i + i * i) % 20),
    documents: Int32Array.from({ length: rows * length }, (_, i) =>
      m % 2 === 1 && i > length + 4 ? -1 : (i + m) >> 3,
    ),
    rows,
    length,
  }))
}

const valuesByName = (named: readonly NamedParameter[], valuesOf: (named: NamedParameter) => number[] | null) =>
  Object.fromEntries(named.map(each => [each.name, valuesOf(each)]))

export const gradientsOf = (named: readonly NamedParameter[]) =>
  valuesByName(named, ({ parameter: { grad } }) => (grad ? Array.from(readF64(grad)) : null))

export const weightsOf = (named: readonly NamedParameter[]) =>
  valuesByName(named, ({ parameter }) => Array.from(readF64(parameter)))

/** Loss, metrics, gradients and gradient norm of a step on one rank: all micro-batches in sequence, weighted by their number of positions with a loss. */
export function stepOnOneRank(model: DeepSeek, microBatches: number) {
  const batches = batchesOf(microBatches, model)
  const named = namedParameters(model)
  const counts = scope(() => batches.map(batch => model.loss(batch, { training: false }).count))
  const total = counts.reduce((sum, count) => sum + count, 0)
  let loss = 0
  const metrics: Record<string, number> = {}
  for (const [m, batch] of batches.entries())
    scope(() => {
      const share = counts[m] / total
      const part = model.loss(batch)
      loss += share * readF64(part.loss)[0]
      metrics['nll'] = (metrics['nll'] ?? 0) + readF64(part.nll)[0] / total
      for (const [name, value] of Object.entries(part.metrics))
        metrics[name] = (metrics[name] ?? 0) + share * readF64(value)[0]
      backward(part.loss.mul(share))
    })
  const gradients = gradientsOf(named)
  const squares = Object.values(gradients)
    .flatMap(values => values ?? [])
    .map(x => x * x)
  return { loss, metrics, gradients, gradNorm: Math.sqrt(squares.reduce((sum, x) => sum + x, 0)) }
}

/** Takes one step with each of two schedules on two ranks. Returns the losses and a digest of this rank's gradients. */
export async function pipelineSteps(ranks: Communicator): Promise<{ loss: number[]; gradients: string }> {
  const loss: number[] = []
  const digest = createHash('sha256')
  for (const schedule of [zeroBubbleH1(2, 3), dualPipe(2, 4)]) {
    const model = newModel()
    const pipeline = new Pipeline(model, schedule, ranks)
    loss.push((await pipeline.step(batchesOf(schedule.microBatches, model))).loss)
    digest.update(JSON.stringify(gradientsOf(pipeline.parameters)))
  }
  return { loss, gradients: digest.digest('hex') }
}

/** Takes a step with expert parallelism. Returns its result and a digest of this rank's gradients. */
export async function expertParallelStep(ranks: Communicator): Promise<ParallelStepResult & { gradients: string }> {
  const model = newModel()
  const parallel = new ExpertParallel(model, ranks)
  const result = await parallel.step(batchesOf(2 * ranks.size, model).slice(2 * ranks.rank, 2 * ranks.rank + 2))
  return { ...result, gradients: digestOfGradients(parallel) }
}

/** Takes a step with DualPipeV in two pipelines, over which the experts are sharded. Returns its result and a digest of this rank's gradients. */
export async function expertParallelPipelineStep(
  ranks: Communicator,
): Promise<ParallelStepResult & { gradients: string }> {
  const model = newModel()
  const schedule = dualPipeV(ranks.size / 2, ranks.size)
  const pipeline = new Pipeline(model, schedule, ranks, { expertParallelSize: 2 })
  const { rank, world } = pipeline.dataShard
  const batches = batchesOf(world * schedule.microBatches, model).filter((_, m) => m % world === rank)
  return { ...(await pipeline.step(batches)), gradients: digestOfGradients(pipeline) }
}

const digestOfGradients = ({ parameters }: { readonly parameters: readonly NamedParameter[] }) =>
  createHash('sha256')
    .update(JSON.stringify(gradientsOf(parameters)))
    .digest('hex')
