/**
 * @file A whole model: the network with training, generation, loading and saving.
 *
 * Legend: B batch, T time, E experts, V vocabulary.
 */
import { type CheckpointLocation, type FolderLocation, type FolderOptions, folderOptionNames } from '@moe/checkpoint'
import {
  type Backend,
  checkOptions,
  concat,
  defaultBackend,
  denseWeight,
  fromHost,
  type InitOptions,
  isFrozen,
  type LocalParameter,
  noGrad,
  Random,
  type Tensor,
} from '@moe/core'
import { type MtpAcceptance, mtpAcceptance, shiftTokens, type TokenRows } from '@moe/mtp'
import { type Balancer, type LayerLoad, type LoadMonitor, scheduled, type TokenDropping, updateBias } from '@moe/router'
import {
  changedConfig,
  type DeepSeekConfigInput,
  type DenseConfigInput,
  endTokens,
  type LatentConfigInput,
  parseConfig,
} from './config.ts'
import { ContinuousBatch, type ContinuousBatchOptions } from './continuous-batch.ts'
import type { LayerOptions } from './decoder-layer.ts'
import type { GenerateOptions, Generation, SessionOptions, TextOptions } from './generation.ts'
import type { TokenLogProb } from './log-probs.ts'
import { LossParts, type LossSource } from './loss-parts.ts'
import { Network } from './network.ts'
import {
  checkDropping,
  checkRecompute,
  type DeepSeekOptions,
  defaultObjective,
  type Objective,
  optionNames,
} from './options.ts'
import { PiecewiseLoss } from './piecewise-loss.ts'
import { loadPretrained, savePretrained } from './pretrained.ts'
import { type ScoreOptions, score } from './score.ts'
import { generate, Session } from './session.ts'
import { DeepSeekStages } from './stages.ts'
import { namedMoeLayers, reportLoads, type StepCounts, sumCounts } from './step-report.ts'
import {
  type DeepSeekLoss,
  digestOf,
  type HostInputs,
  type LossTensors,
  lossInputs,
  type StagedDeepSeek,
  trainsIndexers,
  uploadInputs,
} from './training-loss.ts'

/** Options of `DeepSeek.fromPretrained`. */
export interface FromPretrainedOptions extends Omit<DeepSeekOptions, 'seed'>, FolderOptions {
  /**
   * Overrides of config.json, for example `{ max_position_embeddings, rope_scaling }` for a longer context. `original_max_position_embeddings` of `rope_scaling` is by default the context that the
   * model has been trained with. Sizes of weights cannot be changed. `{ model_type: 'deepseek_v32', index_topk }` converts a model of another type with latent attention to sparse attention: it gets new
   * indexers with random weights, which must be trained (see `indexerWarmup`).
   */
  readonly config?: Partial<LatentConfigInput> | Partial<DenseConfigInput> | undefined
  /**
   * Opens a part of the model: returns the parameters to load, for example `new ExpertParallel(model, ranks).leadWeights`. The other weights get no memory. Default: all parameters.
   */
  readonly parameters?: ((model: DeepSeek) => readonly LocalParameter[]) | undefined
}

/** A language model with the architecture of DeepSeek V2, V3 or DeepSeek LLM, of any size. */
export class DeepSeek extends Network {
  readonly #objective: Objective
  readonly #balancer: Balancer | null
  readonly #monitor: LoadMonitor | null
  /** Returns 1 for the sequences of a batch that lose no token and 0 for others, `[B]`. Null without token dropping. */
  readonly #undropped: ((rows: TokenRows) => Float32Array) | null
  #step = 0
  #layerLoads: readonly LayerLoad[] = []

  /**
   * Creates a model with random weights. The same seed gives the same weights on every backend. For large models, use `createModule(() => new DeepSeek(config))`, which does not block the event loop.
   * @throws MoeError E_CONFIG with all problems of the configuration in one message; E_OUT_OF_MEMORY, after freeing what was allocated
   */
  constructor(config: DeepSeekConfigInput, options: DeepSeekOptions = {}) {
    checkOptions('DeepSeek', options, optionNames)
    const { seed = 0, backend = defaultBackend(), weights, objective = {}, balancer, monitor = null } = options
    checkOptions('DeepSeek objective', objective, defaultObjective)
    checkRecompute(options.recompute)
    const { undropped: share = 0.1, ...budget } = options.dropping ?? {}
    if (options.dropping) checkDropping(options.dropping)
    const dropping = options.dropping && (budget as TokenDropping)
    const parsed = parseConfig(config)
    const std = seed === null ? 0 : parsed.initializer_range
    const init: InitOptions & { backend: Backend } = { random: new Random(seed ?? 0), std, backend, weights }
    super(parsed, { ...init, balancer, dropping, recompute: options.recompute })
    this.#objective = { ...defaultObjective, ...objective }
    this.#balancer = balancer ?? null
    this.#monitor = monitor
    // Seeded by content: ranks with the same rows draw the same, others do not.
    const draw = ({ tokens, rows }: TokenRows) =>
      new Random(seed ?? 0).fork(`undropped/${this.step}/${digestOf([tokens])}`).uniform(rows)
    this.#undropped = dropping ? rows => draw(rows).map(x => (x < share ? 1 : 0)) : null
  }

  /**
   * Opens a checkpoint in the Hugging Face layout (config.json and safetensors) of a supported `model_type`. For a multimodal model, only the text model is read.
   *
   * The location can be a folder on disk, an `http(s):` URL of a folder, `File` objects, or a folder handle of a browser. In a browser, use `new URL('model/', document.baseURI)` for a folder next to the page. A folder on disk can also contain
   * adapters written by `saveAdapters` or PEFT; then the base model that they name is opened, which must be a local folder.
   * @throws MoeError E_CHECKPOINT for missing, corrupt or unexpected files, E_CONFIG, E_STATE_DICT for weights of another model, E_ABORTED
   */
  static async fromPretrained(location: CheckpointLocation, options: FromPretrainedOptions = {}): Promise<DeepSeek> {
    const { seed, ...names } = optionNames
    checkOptions('DeepSeek.fromPretrained', options, {
      ...{ ...names, ...folderOptionNames },
      ...{ config: true, parameters: true },
    })
    const { root, fetch, signal, onProgress, config: changes, parameters, ...rest } = options
    const reading = { root, fetch, signal, onProgress }
    const make = (config: DeepSeekConfigInput) =>
      new DeepSeek(changes ? changedConfig(config, changes) : config, { ...rest, seed: null })
    return loadPretrained(location, reading, make, parameters)
  }

  /** Weights of the auxiliary losses, and speed of the balance bias. May be changed between steps. */
  get objective(): Objective {
    return this.#objective
  }

  /** Number of optimizer steps, for schedules and random draws. `afterStep` increments it. Set it when you resume training; `train` does. */
  get step(): number {
    return this.#step
  }

  set step(step: number) {
    this.#step = step
    for (const layer of this.moeLayers) layer.step = step
  }

  /** Settings that influence training besides weights and step. `train` compares them when it resumes a run. */
  get settings(): Readonly<Record<string, unknown>> {
    return { ...this.config, ...this.#objective }
  }

  /** Number of token ids. */
  get vocabSize(): number {
    return this.config.vocab_size
  }

  /** Number of positions that a text may have: `max_position_embeddings`. */
  get contextLength(): number {
    return this.config.max_position_embeddings
  }

  /** Ids of the tokens that end a generated text: `eos_token_id`. */
  get endTokens(): number[] {
    return endTokens(this.config)
  }

  /** Whether attention is limited to the tokens of the same text if several share a row; always true. */
  get isolates(): boolean {
    return true
  }

  /**
   * Returns the training loss of rows of T + lookahead tokens: mean next-token cross-entropy + λ MTP loss + α balance loss + indexer losses. With `training: false`, only the first is computed and loads are not counted.
   * Positions before `from` carry no loss. If rows have `weights`, the first is the mean of the weighted losses, and MTP modules, which are not weighted, give no gradient to the main model.
   */
  loss(rows: TokenRows, options: { training?: boolean; from?: number } = {}): DeepSeekLoss {
    checkOptions('DeepSeek.loss', options, { training: true, from: true })
    const { training = true } = options
    const { arrays, count } = this.#lossSource().inputs(rows, options)
    const inputs = uploadInputs(arrays, this.backend)
    return { ...this.#lossOf(inputs, { training }), count }
  }

  /**
   * `loss` and `afterStep`, each split into host inputs and ops, so that the ops can be recorded and replayed with other inputs. Undefined with a balancer or token dropping, whose ops depend on the step, and
   * for subclasses that override `loss` or `afterStep`.
   * @internal
   */
  get staged(): StagedDeepSeek | undefined {
    const { loss, afterStep } = DeepSeek.prototype
    if (this.#balancer || this.#undropped || this.loss !== loss || this.afterStep !== afterStep) return undefined
    return {
      inputs: rows => this.#lossInputs(rows, true),
      stepInputs: () => {
        const { mtpDetached, mtpAcceptance: measured, indexerWarmup } = this.#objective
        return {
          arrays: this.#factors(),
          kind: `${mtpDetached} ${measured} ${indexerWarmup} ${trainsIndexers(this.config, this.#objective)}`,
        }
      },
      loss: inputs => {
        const loads: Tensor[] = []
        const parts = this.#lossOf(inputs as unknown as LossTensors, {
          training: true,
          onLoad: load => loads.push(load),
        })
        return { ...parts, carried: loads.length === 0 ? [] : [noGrad(() => concat(loads))] }
      },
      afterInputs: () => ({
        speed: { data: Float32Array.of(scheduled(this.#objective.biasSpeed, this.step)), shape: [] },
      }),
      after: ({ speed }, [loads]) => {
        this.moeLayers.forEach(({ gate: { e_score_correction_bias: bias } }, i) => {
          if (bias && !isFrozen(bias)) updateBias(bias, loads.narrow(0, i * bias.size, (i + 1) * bias.size), { speed })
        })
      },
      report: ([loads]) => {
        const layers = this.moeLayers
        const size = layers.length === 0 ? 0 : loads.length / layers.length
        return this.#report(layers.map((_, i) => ({ load: Promise.resolve(loads.slice(i * size, (i + 1) * size)) })))
      },
    }
  }

  /**
   * Splits the training loss into pipeline stages of about equal cost, between layers, before the head, and between MTP modules. `Pipeline` of `@moe/parallel` runs them. The metrics of `mtpAcceptance` are not
   * computed.
   * @param stages from 1 to layers + 1 + MTP modules
   * @param options.sequenceLength positions per row, for the cost of attention. Default 1024.
   * @throws MoeError E_CONFIG
   */
  inStages(stages: number, options: { sequenceLength?: number } = {}): DeepSeekStages {
    checkOptions('DeepSeek.inStages', options, { sequenceLength: true })
    const { sequenceLength = 1024 } = options
    return new DeepSeekStages(this, stages, sequenceLength, this.#lossSource())
  }

  /**
   * Returns the loss of rows, as `loss`, in pieces between which a rank can wait for others: for expert parallelism. `ExpertParallel` of `@moe/parallel` runs it. The metrics of `mtpAcceptance` are not
   * computed.
   * @param options.training false for an evaluation, which has only the next-token loss
   * @param options.from positions before this one carry no loss
   */
  inPieces(rows: TokenRows, options: { training?: boolean; from?: number } = {}): PiecewiseLoss {
    checkOptions('DeepSeek.inPieces', options, { training: true, from: true })
    return new PiecewiseLoss(this, rows, this.#lossSource(), options)
  }

  #lossSource(): LossSource {
    return {
      inputs: (rows, { training = true, from }) => {
        const { arrays, count } = this.#lossInputs(rows, training, from)
        return { arrays: { ...arrays, ...(training ? this.#factors() : {}) }, count }
      },
      objective: this.#objective,
      balancer: this.#balancer !== null,
    }
  }

  /** Inputs that depend only on the batch. */
  #lossInputs(rows: TokenRows, training: boolean, from = 0) {
    return lossInputs(rows, rows.length - this.lookahead, training ? this.mtp.length : 0, {
      from,
      undropped: training ? this.#undropped?.(rows) : undefined,
    })
  }

  /** Inputs that depend on the step. */
  #factors(): HostInputs {
    const { mtpWeight, balanceWeight, indexerWeight } = this.#objective
    const weights = [mtpWeight, balanceWeight, indexerWeight].map(weight => scheduled(weight, this.step))
    return { factors: { data: Float32Array.from(weights), shape: [weights.length] } }
  }

  /** Runs the ops of the loss. With `onLoad`, the loads of the layers are passed to it, in the order of `moeLayers`, and not counted. */
  #lossOf(inputs: LossTensors, options: Pick<LayerOptions, 'training' | 'onLoad'>): Omit<DeepSeekLoss, 'count'> {
    const parts = new LossParts(this, inputs, this.#lossSource(), options)
    const hidden = parts.runAll()
    const { loss, metrics } = parts.sum()
    const { nll: mean, ...others } = metrics
    if (options.training && this.mtp.length > 0 && this.#objective.mtpAcceptance) {
      const head = denseWeight(this.lm_head.weight)
      const { cumulative } = mtpAcceptance(this.mtp, hidden, inputs, head, { starts: inputs.starts })
      for (const [k, rate] of cumulative.entries()) others[`acceptance${k + 1}`] = rate
    }
    return { loss: loss as Tensor, nll: parts.nll as Tensor, nlls: parts.nlls as Tensor, metrics: others }
  }

  /**
   * Returns, for each depth, the share of drafts that the main model would accept on rows of T + lookahead tokens. For evaluation: loads are not counted, and no gradients are recorded.
   */
  mtpAcceptance(rows: TokenRows): MtpAcceptance {
    return this.infer(() => {
      const time = rows.length - this.lookahead
      const { starts } = uploadInputs(this.#lossInputs(rows, false).arrays, this.backend)
      const ids = fromHost(shiftTokens(rows, time, 0).ids, [rows.rows, time], 'i32', this.backend)
      return mtpAcceptance(this.mtp, this.hidden(ids, { starts }), rows, denseWeight(this.lm_head.weight), { starts })
    })
  }

  /** Expert loads of the latest step, updated by `afterStep`, for the layers that have processed tokens. `train` logs them. */
  get layerLoads(): readonly LayerLoad[] {
    return this.#layerLoads
  }

  /**
   * Ends an optimizer step: updates the balance biases from the loads of the whole batch. Resolves to metrics: mean and maximum MaxVio over the layers, and the number of dead experts.
   * @param sum all-reduces the loads `i32 [E]` if several ranks train the model
   */
  async afterStep(sum?: (loads: readonly Tensor[]) => Promise<Tensor[]>): Promise<Record<string, number>> {
    const speed = scheduled(this.#objective.biasSpeed, this.step)
    const layers = this.moeLayers
    const sums = sum && layers.length > 0 ? await sumCounts(layers, sum, this.#undropped !== null) : null
    const counts = layers.map((layer, i) => {
      const load = (sums?.[i] ?? layer.load)?.values()
      const kept = (sums?.[layers.length + i] ?? layer.kept)?.values()
      const reduce = (counted: Tensor) => sums?.[i] ?? counted
      const bias = layer.gate.e_score_correction_bias
      if (sums && bias && !isFrozen(bias) && layer.load === null) {
        // The layer ran only on other ranks.
        if (layer.balancer) layer.balancer.update?.(bias, sums[i], this.step)
        else updateBias(bias, sums[i], { speed })
      }
      if (layer.balancer) layer.rebalance({ step: this.step, reduce })
      else layer.updateBias({ speed, reduce })
      return { load, kept }
    })
    try {
      return await this.#report(counts)
    } finally {
      for (const count of sums ?? []) count.dispose()
    }
  }

  /** Ends the step. Resolves to the result of `afterStep`. */
  async #report(counts: readonly StepCounts[]): Promise<Record<string, number>> {
    const layers = namedMoeLayers(this.blocks)
    const biases = layers.map(([, { gate }]) => this.#monitor && gate.e_score_correction_bias?.values())
    this.step += 1
    const { layerLoads, metrics } = await reportLoads(layers, counts, biases, {
      monitor: this.#monitor,
      groups: this.config.n_group ?? 1,
    })
    this.#layerLoads = layerLoads
    return metrics
  }

  /** Generates a continuation of token ids, yielding ids or, with a tokenizer, text. Greedy unless `temperature` is set. */
  generate(ids: ArrayLike<number>, options: TextOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: GenerateOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: GenerateOptions | TextOptions = {}): Generation<number | string> {
    return generate(this, ids, options)
  }

  /**
   * Creates a session for consecutive texts, for example the turns of a conversation. It keeps its cache, so that only the part of a prompt that differs from the previous text is processed. Dispose of it before the
   * model.
   */
  session(options: SessionOptions = {}): Session {
    return new Session(this, options)
  }

  /** Creates a continuous batch, which generates many texts at once, for example for a server. Dispose of it before the model. */
  continuousBatch(options: ContinuousBatchOptions = {}): ContinuousBatch {
    return new ContinuousBatch(this, options)
  }

  /**
   * Returns the log-probability of each token of texts, given the tokens before it; null for the first. Texts of similar length are processed together. To compare continuations, add up their `logProb`.
   * @throws MoeError E_ATTR
   */
  score(
    texts: ReadonlyArray<ArrayLike<number>>,
    options: ScoreOptions = {},
  ): Promise<Array<Array<TokenLogProb | null>>> {
    return score(this, texts, options)
  }

  /**
   * Writes config.json and model.safetensors in the Hugging Face layout. In a browser, `folder` is a handle, for example `await navigator.storage.getDirectory()`.
   * @throws MoeError E_UNSUPPORTED for a model with adapters, and for a path in a browser; E_CHECKPOINT if writing fails
   */
  async save(folder: FolderLocation): Promise<void> {
    await savePretrained(this, folder)
  }
}
