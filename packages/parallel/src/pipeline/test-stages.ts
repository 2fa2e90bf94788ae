/** @file For tests only: a small DeepSeek, cut between its layers, and a step of it by a schedule. */
import { createHash } from 'node:crypto'
import { linearCrossEntropy, type Parameter, type Tensor, tensor, trainable } from '@moe/core'
import { readF64 } from '@moe/core/reference'
import { DeepSeek, type DeepSeekConfigInput, presets } from '@moe/deepseek'
import type { Communicator } from '../communicator/communicator.ts'
import { dualPipe } from '../schedule/dual-pipe.ts'
import { type Schedule, stagesOf } from '../schedule/schedule.ts'
import { zeroBubbleH1 } from '../schedule/zero-bubble.ts'
import { sumReplicas } from './replicas.ts'
import { type PipelineStage, runSchedule } from './run-schedule.ts'

const layers = 8
const config: DeepSeekConfigInput = {
  ...presets.tiny,
  vocab_size: 20,
  hidden_size: 8,
  intermediate_size: 12,
  moe_intermediate_size: 4,
  num_hidden_layers: layers,
  num_attention_heads: 2,
  n_routed_experts: 4,
  num_experts_per_tok: 2,
  n_group: 2,
  topk_group: 1,
  q_lora_rank: 6,
  kv_lora_rank: 4,
  qk_nope_head_dim: 4,
  qk_rope_head_dim: 2,
  v_head_dim: 4,
  num_nextn_predict_layers: 0,
  initializer_range: 0.3,
}
const [batch, time] = [1, 3]
const alpha = 0.01

const ids = (microBatch: number, ahead: number) =>
  Array.from({ length: batch * time }, (_, i) => (7 * microBatch + 3 * (i + ahead) + i * i) % 20)

/** Part `stage` of `stages` of a model: so many of its layers, the embedding before the first, norm, head and loss behind the last. */
export class Stage implements PipelineStage {
  readonly parameters: readonly Parameter[]
  readonly #model: DeepSeek
  readonly #from: number
  readonly #to: number
  readonly #microBatches: number

  constructor(model: DeepSeek, stage: number, stages: number, microBatches: number) {
    this.#model = model
    this.#from = (stage * layers) / stages
    this.#to = ((stage + 1) * layers) / stages
    this.#microBatches = microBatches
    const { embed_tokens, norm } = model.model
    this.parameters = [
      ...(stage === 0 ? trainable(embed_tokens) : []),
      ...model.decoder.slice(this.#from, this.#to).flatMap(layer => trainable(layer)),
      ...(stage === stages - 1 ? [...trainable(norm), model.lm_head.weight] : []),
    ]
  }

  forward(input: Tensor | null, microBatch: number) {
    const { embed_tokens, norm } = this.#model.model
    let x = input ?? embed_tokens.forward(tensor(ids(microBatch, 0), [batch, time], { dtype: 'i32' }))
    const losses: Tensor[] = []
    for (let i = this.#from; i < this.#to; i++) {
      const onBalanceLoss = (loss: Tensor) => losses.push(loss.mul(alpha / this.#microBatches))
      x = this.#model.decoder[i].forward(x, { layer: i, training: true, onBalanceLoss })
    }
    if (this.#to < layers) return { output: x, losses }
    const hidden = norm.forward(x).reshape([batch * time, 8])
    const targets = tensor(ids(microBatch, 1), [batch * time], { dtype: 'i32' })
    losses.push(
      linearCrossEntropy(hidden, this.#model.lm_head.weight, targets)
        .mean()
        .mul(1 / this.#microBatches),
    )
    return { losses }
  }
}

export const gradientsOf = (parameters: readonly Parameter[]) =>
  parameters.map(p => (p.grad ? Array.from(readF64(p.grad)) : null))

export const newModel = () => new DeepSeek(config, { seed: 1 })

/** The stages of this rank, of a model of its own. */
export function stagesOfRank(schedule: Schedule, ranks: Communicator): { model: DeepSeek; own: Map<number, Stage> } {
  const model = newModel()
  const { stages, microBatches } = schedule
  const own = stagesOf(schedule, ranks.rank).map(n => [n, new Stage(model, n, stages, microBatches)] as const)
  return { model, own: new Map(own) }
}

/** The loss of a step; gradients are with the parameters. */
export async function step(schedule: Schedule, ranks: Communicator, own: ReadonlyMap<number, Stage>): Promise<number> {
  const loss = await runSchedule(schedule, ranks, own, { between: { shape: [batch, time, 8], dtype: 'f32' } })
  await sumReplicas(schedule, ranks, n => (own.get(n) as Stage).parameters)
  const value = await loss.item()
  loss.dispose()
  return value
}

/** Steps by two schedules on two ranks: losses, and a digest of this rank's gradients. */
export async function pipelineSteps(ranks: Communicator): Promise<{ loss: number[]; gradients: string }> {
  const loss: number[] = []
  const digest = createHash('sha256')
  for (const schedule of [zeroBubbleH1(2, 3), dualPipe(2, 4)]) {
    const { own } = stagesOfRank(schedule, ranks)
    loss.push(await step(schedule, ranks, own))
    for (const { parameters } of own.values()) digest.update(JSON.stringify(gradientsOf(parameters)))
  }
  return { loss, gradients: digest.digest('hex') }
}
