/**
 * @file Splits a model into stages for pipeline parallelism: consecutive parts of `LossParts`, each from `[B, T, D]` to the same shape.
 *
 * Legend: B batch, T time, D hidden size, V vocabulary.
 */
import {
  type Backend,
  type DType,
  MoeError,
  type NamedParameter,
  namedParameters,
  type Shape,
  type Tensor,
} from '@moe/core'
import type { TokenRows } from '@moe/mtp'
import { balancedRuns } from './balanced-runs.ts'
import { type DeepSeekConfig, isMoELayer, sharesIndexer } from './config.ts'
import { countParameters } from './count-parameters.ts'
import { LossParts, type LossSource } from './loss-parts.ts'
import type { Network } from './network.ts'
import { PartsInPieces } from './piecewise-loss.ts'
import type { PieceRunner, RouteTokens } from './remote-experts.ts'
import { digestOf, type HostInputs, trainsIndexers, uploadInputs } from './training-loss.ts'

/** One stage in one step. Implements `PipelineStage` of `@moe/parallel`. */
export interface DeepSeekStage {
  /**
   * Runs the forward pass of the stage for one micro-batch.
   * @param input `[B, T, D]` of the previous stage; null for the first
   * @returns `output [B, T, D]` for the next stage (none from the last); `losses`, scalars whose sum over all stages and micro-batches is the loss of the step; and detached `metrics`, which are summed likewise
   */
  forward(input: Tensor | null, microBatch: number): StageResult
  /** The same in pieces, for expert parallelism. The input, the output and the losses are leaves. */
  inPieces(input: Tensor | null, microBatch: number, pass: PieceRunner, route: RouteTokens): Promise<StageResult>
}

/** The result of a stage for one micro-batch. */
export interface StageResult {
  /** `[B, T, hidden]`, for the next stage; undefined for the last. */
  readonly output?: Tensor
  /** Scalars whose sum is the stage's contribution to the loss. */
  readonly losses: readonly Tensor[]
  /** Detached scalars, to be summed over stages and micro-batches. */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** A micro-batch on the host. */
interface MicroBatch {
  readonly arrays: HostInputs
  /** Share of all loss-carrying positions of the step. */
  readonly share: number
  /** Whether it is trained on. */
  readonly training: boolean
}

/** A model split into stages, returned by `DeepSeek.inStages`. The stages use the parameters of the model. */
export class DeepSeekStages {
  /** The parameters of each stage, with their names in the model. Embedding and head belong to every stage that uses them; MTP modules do. */
  readonly parameters: ReadonlyArray<readonly NamedParameter[]>
  /** The cost of each stage: multiplications per token in the forward pass. */
  readonly costs: readonly number[]
  /** Names of the metrics of a step, which are means over its positions. */
  readonly metrics: readonly string[]
  readonly #model: Network
  readonly #source: LossSource
  /** Index of the first part of each stage, and the number of parts. */
  readonly #starts: readonly number[]

  constructor(model: Network, stages: number, sequenceLength: number, source: LossSource) {
    const { config } = model
    if (!(sequenceLength >= 0 && Number.isFinite(sequenceLength))) {
      const problem = `sequenceLength = ${sequenceLength}, expected a number of positions`
      throw new MoeError({ code: 'E_CONFIG', op: 'inStages', problem, fix: 'pass the number of positions of a row' })
    }
    const costs = partCosts(config, sequenceLength)
    // Layers that share an indexer stay together, because selections are not sent between stages.
    const cuts = costs.flatMap((_, part) => (sharesIndexer(config, part) ? [] : [part]))
    if (!Number.isInteger(stages) || stages < 1 || stages > cuts.length) {
      const { num_hidden_layers: layers, num_nextn_predict_layers: modules } = config
      const together = cuts.length === costs.length ? '' : ', and layers that share an indexer stay in one stage'
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'inStages',
        problem: `cannot split the model into ${stages} stages`,
        fix: `pass 1 to ${cuts.length}: the model has ${layers} layers, a head and ${modules} MTP modules${together}`,
      })
    }
    this.#model = model
    this.#source = source
    const sumOf = (from: number, to: number) => costs.slice(from, to).reduce((sum, cost) => sum + cost, 0)
    const groups = cuts.map((part, i) => sumOf(part, cuts[i + 1] ?? costs.length))
    this.#starts = [...balancedRuns(groups, stages).map(group => cuts[group]), costs.length]
    const perStage = <T>(of: (from: number, to: number) => T) =>
      Array.from({ length: stages }, (_, n) => of(this.#starts[n], this.#starts[n + 1]))
    this.costs = perStage(sumOf)
    const named = namedParameters(model)
    const parts = costs.map((_, part) => new Set(this.#parametersOf(part)))
    this.parameters = perStage((from, to) =>
      named.filter(({ parameter }) => parts.slice(from, to).some(part => part.has(parameter))),
    )
    this.metrics = [
      'nll',
      ...(config.num_nextn_predict_layers > 0 ? ['mtp'] : []),
      ...(model.moeLayers.length > 0 ? ['balance'] : []),
      ...(trainsIndexers(config, source.objective) ? ['indexer'] : []),
    ]
  }

  /**
   * Returns the stages with the micro-batches of one step, which must have the same size. Micro-batches are weighted by their loss-carrying positions, so that the sum of all losses is the loss of one batch with all
   * rows (except MTP and balance losses, which are means over micro-batches).
   * @returns `activations`, the spec of the tensor that is passed between stages; `count`, the number of loss-carrying positions; `digest`, a 32-bit digest to check that all ranks have the same micro-batches
   * @throws MoeError E_SHAPE
   */
  step(batches: readonly TokenRows[]): {
    readonly stages: readonly DeepSeekStage[]
    readonly activations: { readonly shape: Shape; readonly dtype: DType; readonly backend: Backend }
    readonly count: number
    readonly digest: number
  } {
    const [{ rows, length }] = batches
    if (batches.some(batch => batch.rows !== rows || batch.length !== length)) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'inStages',
        problem: `the micro-batches have different shapes: ${batches.map(batch => `[${batch.rows},${batch.length}]`).join(' ')}`,
        fix: 'use the same number of rows and length for all',
      })
    }
    const inputs = batches.map(batch => this.#source.inputs(batch, {}))
    const total = inputs.reduce((sum, { count }) => sum + count, 0)
    const micro = inputs.map(({ arrays, count }) => ({ arrays, share: count / Math.max(1, total), training: true }))
    return {
      stages: this.parameters.map((_, n) => this.#stage(n, micro)),
      activations: this.#activationsOf(batches[0]),
      count: total,
      digest: digestOf(batches.flatMap(({ tokens, documents }) => [tokens, documents])),
    }
  }

  /**
   * Returns the stages for an evaluation, up to the one with the head. Its only loss is the sum of the negative log-likelihoods of the micro-batch. Micro-batches may differ in size.
   * @returns `activations` and `counts`, the number of loss-carrying positions, for each micro-batch
   */
  evaluation(batches: ReadonlyArray<{ readonly batch: TokenRows; readonly from: number }>): {
    readonly stages: readonly DeepSeekStage[]
    readonly activations: ReadonlyArray<{ readonly shape: Shape; readonly dtype: DType; readonly backend: Backend }>
    readonly counts: readonly number[]
  } {
    const inputs = batches.map(({ batch, from }) => this.#source.inputs(batch, { training: false, from }))
    const micro = inputs.map(({ arrays }) => ({ arrays, share: 1, training: false }))
    const head = this.#model.decoder.length
    return {
      stages: this.#starts.filter(start => start <= head).map((_, n) => this.#stage(n, micro)),
      activations: batches.map(({ batch }) => this.#activationsOf(batch)),
      counts: inputs.map(({ count }) => count),
    }
  }

  #stage(n: number, micro: readonly MicroBatch[]): DeepSeekStage {
    return {
      forward: (input, m) => this.#forward(n, input, micro[m]),
      inPieces: (input, m, pass, route) => this.#inPieces(n, input, micro[m], pass, route),
    }
  }

  #activationsOf({ rows, length }: TokenRows): { shape: Shape; dtype: DType; backend: Backend } {
    const { backend, config, lookahead } = this.#model
    return { shape: [rows, length - lookahead, config.hidden_size], dtype: 'f32', backend }
  }

  /** The parts of a stage. In an evaluation, the head is the last part. */
  #partsIn(stage: number, { training }: MicroBatch): number[] {
    const [from, to] = this.#starts.slice(stage, stage + 2)
    const end = training ? to : Math.min(to, this.#model.decoder.length + 1)
    return Array.from({ length: end - from }, (_, i) => from + i)
  }

  #forward(stage: number, input: Tensor | null, microBatch: MicroBatch): StageResult {
    const parts = this.#partsOf(microBatch)
    let x = input ?? parts.embed()
    for (const part of this.#partsIn(stage, microBatch)) x = parts.run(part, x)
    return this.#result(stage, x, parts, microBatch)
  }

  async #inPieces(
    stage: number,
    input: Tensor | null,
    microBatch: MicroBatch,
    pass: PieceRunner,
    route: RouteTokens,
  ): Promise<StageResult> {
    const parts = pass.run(() => this.#partsOf(microBatch))
    const inPieces = new PartsInPieces(this.#model, parts, pass, route)
    let x = input ?? inPieces.embed()
    for (const part of this.#partsIn(stage, microBatch)) x = await inPieces.run(part, x)
    return this.#result(stage, x, parts, microBatch, inPieces)
  }

  #partsOf({ arrays, share, training }: MicroBatch): LossParts {
    return new LossParts(this.#model, uploadInputs(arrays, this.#model.backend), this.#source, { share, training })
  }

  #result(
    stage: number,
    x: Tensor,
    parts: LossParts,
    { training }: MicroBatch,
    summed: Pick<LossParts, 'sum'> = parts,
  ): StageResult {
    if (!training) return parts.nll ? { losses: [parts.nll], metrics: {} } : { output: x, losses: [], metrics: {} }
    const { loss, metrics } = summed.sum()
    const isLast = stage === this.parameters.length - 1
    return { ...(isLast ? {} : { output: x }), losses: loss ? [loss] : [], metrics }
  }

  #parametersOf(part: number): Tensor[] {
    const { decoder, mtp, model, lm_head } = this.#model
    const depth = part - decoder.length
    const { embed_tokens: embedding, norm } = model
    const modules =
      depth < 0
        ? [...(part === 0 ? [embedding] : []), decoder[part]]
        : depth === 0
          ? [norm, lm_head]
          : [mtp[depth - 1], ...(this.#model.config.mtp_separate_embeddings ? [] : [embedding, lm_head])]
    return modules.flatMap(module => namedParameters(module).map(({ parameter }) => parameter))
  }
}

/** Multiplications per token in the forward pass of each part: decoder layers, head, MTP modules. Does not count embedding, norms and routing. */
function partCosts(config: DeepSeekConfig, sequenceLength: number): number[] {
  const { hidden_size: hidden, n_routed_experts: experts, num_experts_per_tok: perToken } = config
  const { attention, indexer, moe, dense } = countParameters(config)
  const idle = 3 * hidden * config.moe_intermediate_size * ((experts ?? 0) - (perToken ?? 0))
  const features = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
  // On average, a position attends to half of the sequence.
  const scores = (config.num_attention_heads * features * sequenceLength) / 2
  const indexScores = ((config.index_n_heads ?? 0) * (config.index_head_dim ?? 0) * sequenceLength) / 2
  const layer = (i: number) =>
    attention +
    scores +
    (sharesIndexer(config, i) ? -indexer : indexScores) +
    (isMoELayer(config, i) ? moe - idle : dense)
  const head = config.vocab_size * hidden
  const layers = config.num_hidden_layers
  return [
    ...Array.from({ length: layers }, (_, i) => layer(i)),
    head,
    ...Array.from({ length: config.num_nextn_predict_layers }, (_, k) => layer(layers + k) + 2 * hidden ** 2 + head),
  ]
}
