/**
 * @file The whole model: embedding, decoder layers, MTP modules behind them, final norm and head. Keys are those of the released checkpoints.
 *
 * Legend: B batch, T time, D hidden size, V vocabulary.
 */
import {
  type CacheOptions,
  KvCache,
  MultiHeadLatentAttention,
  PagedCache,
  type PagedCacheOptions,
  RotaryEmbedding,
} from '@moe/attention-mla'
import { type CheckpointPlace, type FolderPlace, folderOptionNames } from '@moe/checkpoint'
import {
  allOrNothing,
  type Backend,
  checkOptions,
  checkShared,
  concat,
  currentPrecision,
  defaultBackend,
  denseWeight,
  disposeModule,
  fromHost,
  type InitOptions,
  isFrozen,
  type Linear,
  linearCrossEntropy,
  Module,
  needAxes,
  noGrad,
  type Precision,
  Random,
  scope,
  type Tensor,
  withPrecision,
} from '@moe/core'
import {
  averageAt,
  idsAhead,
  type MtpAcceptance,
  MtpModule,
  mtpAcceptance,
  mtpLoss,
  shiftTokens,
  type TokenRows,
  targetsAt,
} from '@moe/mtp'
import {
  type Balancer,
  type LayerLoad,
  type LoadMonitor,
  MoELayer,
  scheduled,
  type TokenDropping,
  updateBias,
} from '@moe/router'
import { changedConfig, type DeepSeekConfig, type DeepSeekConfigInput, endTokens, parseConfig } from './config.ts'
import { ContinuousBatch, type ContinuousBatchOptions } from './continuous-batch.ts'
import { type DecoderLayer, isTransient, type LayerOptions, layerNames } from './decoder-layer.ts'
import type { GenerateOptions, Generation, SessionOptions, TextOptions } from './generate.ts'
import type { TokenLogProb } from './log-probs.ts'
import type { LossSource } from './loss-parts.ts'
import {
  checkRecompute,
  type DeepSeekOptions,
  droppingNames,
  type FromPretrainedOptions,
  type Objective,
  optionNames,
  usualObjective,
} from './options.ts'
import { DeepSeekPieces } from './pieces.ts'
import { loadPretrained, savePretrained } from './pretrained.ts'
import { type ScoreOptions, score } from './score.ts'
import { generate, Session } from './session.ts'
import { DeepSeekStages } from './stages.ts'
import { reportLoads, type StepCounts, sumCounts } from './step-report.ts'
import {
  digestOf,
  factorAt,
  type HostInputs,
  type LossTensors,
  lossInputs,
  maskAt,
  uploadInputs,
} from './training-loss.ts'
import { makeTrunk, type Trunk } from './trunk.ts'

/** The loss of a batch and what to log beside it. */
export interface DeepSeekLoss {
  /** Scalar to minimise. */
  readonly loss: Tensor
  /** Sum of the next-token negative log-likelihoods in nats, detached. */
  readonly nll: Tensor
  /** Positions in that sum. */
  readonly count: number
  /** Each of them, detached, by row and position, `[B T]`; 0 where a position carries no loss. */
  readonly nlls: Tensor
  /**
   * Detached scalars: `mtp` (mean over depths), `balance` (mean over layers, without α; of a balancer with its factors), and when asked for
   * `acceptance1` and so on, the share of drafts accepted at each depth together with the shallower ones.
   */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** `loss` and `afterStep` of a model in parts: see `DeepSeek.staged`. Arrays of the same names, shapes and `kind` go through the same ops. */
export interface StagedDeepSeek {
  inputs(rows: TokenRows): { readonly arrays: HostInputs; readonly count: number }
  stepInputs(): { readonly arrays: HostInputs; readonly kind: string }
  /** `carried` is summed over the micro-batches of a step, for `after`: the loads of all layers. */
  loss(inputs: Readonly<Record<string, Tensor>>): Omit<DeepSeekLoss, 'count'> & { readonly carried: readonly Tensor[] }
  afterInputs(): HostInputs
  after(inputs: Readonly<Record<string, Tensor>>, carried: readonly Tensor[]): void
  /** Ends the step; what `afterStep` resolves to. */
  report(carried: ReadonlyArray<Float32Array | Int32Array>): Promise<Record<string, number>>
}

/** A language model of the architecture of DeepSeek V2 and V3, or of DeepSeek LLM, of any size. */
export class DeepSeek extends Module {
  /** What stands below `model.` in checkpoints: `embed_tokens`, `layers` (decoder layers, then MTP modules) and `norm`. */
  model: Trunk
  /** Folder that its weights came from: adapters that a run saves name it as their base. */
  source?: string
  /** `[vocab_size, hidden_size]`; the embedding's own weight where they are tied. */
  lm_head: Linear
  readonly #config: DeepSeekConfig
  readonly #backend: Backend
  readonly #rotary: RotaryEmbedding
  readonly #objective: Objective
  readonly #balancer: Balancer | null
  readonly #monitor: LoadMonitor | null
  /** Which sequences of a batch lose no token, `[B]`: 1 or 0. Null without dropping. */
  readonly #undropped: ((rows: TokenRows) => Float32Array) | null
  #step = 0
  #layerLoads: readonly LayerLoad[] = []

  /**
   * A model with random weights; the same seed gives the same weights on every backend. Large ones are made by `createModule(() => new DeepSeek(config))`,
   * which does not hold up the event loop while weights are drawn.
   * @throws MoeError E_CONFIG with every fault of the configuration in one message; E_OUT_OF_MEMORY, and nothing is left on the device.
   */
  constructor(config: DeepSeekConfigInput, options: DeepSeekOptions = {}) {
    super()
    checkOptions('DeepSeek', options, optionNames)
    const { seed = 0, backend = defaultBackend(), weights, objective = {}, balancer, monitor = null } = options
    checkOptions('DeepSeek objective', objective, usualObjective)
    checkRecompute(options.recompute)
    const { undropped: share = 0.1, ...budget } = options.dropping ?? {}
    if (options.dropping) checkOptions('DeepSeek dropping', options.dropping, droppingNames)
    const dropping = options.dropping && (budget as TokenDropping)
    this.#config = parseConfig(config)
    this.#backend = backend
    this.#objective = { ...usualObjective, ...objective }
    this.#balancer = balancer ?? null
    this.#monitor = monitor
    // By what is in them: all ranks that work on the same rows draw alike, others do not.
    const draw = ({ tokens, rows }: TokenRows) =>
      new Random(seed ?? 0).fork(`undropped/${this.step}/${digestOf([tokens])}`).uniform(rows)
    this.#undropped = dropping ? rows => draw(rows).map(x => (x < share ? 1 : 0)) : null
    const deviation = seed === null ? 0 : this.#config.initializer_range
    const init: InitOptions = { random: new Random(seed ?? 0), deviation, backend, weights }
    this.#rotary = new RotaryEmbedding(this.#config)
    const parts = { balancer, dropping, recompute: options.recompute }
    const { model, head } = allOrNothing(() => makeTrunk(this.#config, this.#rotary, { ...init, ...parts }))
    this.model = model
    this.lm_head = head
  }

  /**
   * Opens a checkpoint in the Hugging Face layout, with config.json and safetensors, of this architecture under any of its names (`model_type`); of a model that sees its text model, and
   * nothing else is read. A folder on the disk, one on the web by its `http(s):` address, or its
   * files as a page is given them. In a browser give `new URL('model/', document.baseURI)` for a folder beside the page. Or a folder on the disk with the adapters
   * that `saveAdapters` or PEFT wrote, beside the base that they name, which must be a folder here.
   * @throws MoeError E_CHECKPOINT for files that are not there, damaged or not what was asked for, E_CONFIG, E_STATE_DICT for weights of another model, E_ABORTED
   */
  static async fromPretrained(place: CheckpointPlace, options: FromPretrainedOptions = {}): Promise<DeepSeek> {
    const { seed, ...names } = optionNames
    checkOptions('DeepSeek.fromPretrained', options, { ...names, ...folderOptionNames, config: true })
    const { root, fetch, signal, onProgress, config: changes, ...rest } = options
    const reading = { root, fetch, signal, onProgress }
    const make = (config: DeepSeekConfigInput) =>
      new DeepSeek(changes ? changedConfig(config, changes) : config, { ...rest, seed: null })
    return loadPretrained(place, reading, make)
  }

  /** Checked, with every default filled in. */
  get config(): DeepSeekConfig {
    return this.#config
  }

  /** Where the weights are. */
  get backend(): Backend {
    return this.#backend
  }

  /** What the loss adds, and how fast the bias moves; may be changed between steps. */
  get objective(): Objective {
    return this.#objective
  }

  /** Optimizer steps done, for schedules and draws: `afterStep` counts. Set it when a run is resumed; `train` does. */
  get step(): number {
    return this.#step
  }

  set step(step: number) {
    this.#step = step
    for (const layer of this.moeLayers) layer.step = step
  }

  /** What decides its numbers beside weights and step: `train` compares it when a run goes on. */
  get settings(): Readonly<Record<string, unknown>> {
    return { ...this.#config, ...this.#objective }
  }

  /** Layers of the main model. */
  get decoder(): readonly DecoderLayer[] {
    return this.model.layers.slice(0, this.#config.num_hidden_layers) as DecoderLayer[]
  }

  /** MTP modules, depth 1 first. */
  get mtp(): ReadonlyArray<MtpModule<LayerOptions>> {
    return this.model.layers.slice(this.#config.num_hidden_layers) as MtpModule<LayerOptions>[]
  }

  /** Token ids that there are embeddings for. */
  get vocabSize(): number {
    return this.#config.vocab_size
  }

  /** Ids at which a generated text ends: `eos_token_id`. */
  get endTokens(): number[] {
    return endTokens(this.#config)
  }

  /** Tokens that a training row needs beyond the positions that are trained on. */
  get lookahead(): number {
    return 1 + this.#config.num_nextn_predict_layers
  }

  /** Texts that share a row do not see each other: batches say where each begins. */
  get isolates(): boolean {
    return true
  }

  /** Logits of every position: `i32 [B, T]` to `[B, T, V]`. */
  forward(ids: Tensor, options: Pick<LayerOptions, 'cache'> = {}): Tensor {
    checkOptions('DeepSeek.forward', options, { cache: true })
    return this.lm_head.forward(this.hidden(ids, options))
  }

  /** Hidden states after the final norm, `i32 [B, T]` to `[B, T, D]`. With a cache, the new tokens are added to it. */
  hidden(ids: Tensor, options: LayerOptions = {}): Tensor {
    needAxes('DeepSeek', ids, ['batch', 'time'])
    checkShared('DeepSeek.hidden', options, layerNames)
    let x = this.model.embed_tokens.forward(ids)
    this.decoder.forEach((layer, i) => {
      const before = x
      x = layer.forward(before, { ...options, layer: i })
      if (isTransient(options)) before.dispose()
    })
    options.cache?.advance(ids.shape[1])
    return this.model.norm.forward(x)
  }

  /** A cache for this model's decoder layers: latent, or keys and values in a dense model. Behind them are those of the first `depth` MTP modules (default 0). */
  makeCache(options: Pick<CacheOptions, 'batch' | 'capacity' | 'dtype'> & { readonly depth?: number } = {}): KvCache {
    checkOptions('DeepSeek.makeCache', options, { batch: true, capacity: true, dtype: true, depth: true })
    const { depth = 0, ...memory } = options
    return new KvCache(this.decoder[0].self_attn.cacheFeatures, { ...memory, ...this.#cacheOptions(depth) })
  }

  /** The same for sequences that come and go; `depth` MTP modules are in it, too. */
  makePagedCache(
    options: Pick<PagedCacheOptions, 'tokens' | 'pageSize' | 'dtype'> & { readonly depth?: number },
  ): PagedCache {
    checkOptions('DeepSeek.makePagedCache', options, { tokens: true, pageSize: true, dtype: true, depth: true })
    const { depth = 0, ...memory } = options
    const features = this.decoder[0].self_attn.cacheFeatures
    return new PagedCache(features, { ...memory, ...this.#cacheOptions(depth), lookahead: depth })
  }

  #cacheOptions(depth: number) {
    return { layers: this.#config.num_hidden_layers + depth, backend: this.#backend }
  }

  /**
   * Training loss of rows of T + lookahead tokens: mean next-token cross-entropy + λ MTP + α balance. With `training: false` only the first, and no load is
   * counted. Positions below `from` carry no loss. Where rows have `weights`, the first is the mean of weighted losses, and MTP modules, which these do not weigh, give no gradient to the main model.
   */
  loss(rows: TokenRows, options: { training?: boolean; from?: number } = {}): DeepSeekLoss {
    checkOptions('DeepSeek.loss', options, { training: true, from: true })
    const { training = true, from } = options
    const { arrays, count } = this.#lossInputs(rows, training, from)
    const inputs = uploadInputs({ ...arrays, ...(training ? this.#factors() : {}) }, this.#backend)
    return { ...this.#lossOf(inputs, { training }), count }
  }

  /**
   * `loss` and `afterStep` in two parts each, what the host contributes and the ops on that: the ops can be recorded once and run again on other inputs.
   * Undefined for models that draw or schedule within their ops (with a balancer or with dropping), and for classes with a `loss` or `afterStep` of their own.
   * @internal
   */
  get staged(): StagedDeepSeek | undefined {
    const { loss, afterStep } = DeepSeek.prototype
    if (this.#balancer || this.#undropped || this.loss !== loss || this.afterStep !== afterStep) return undefined
    return {
      inputs: rows => this.#lossInputs(rows, true),
      stepInputs: () => {
        const { mtpDetached, mtpAcceptance: measured } = this.#objective
        return { arrays: this.#factors(), kind: `${mtpDetached} ${measured}` }
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
   * Cuts the training loss into stages for a pipeline, so that all take about the same time: between layers, before the head, and between MTP modules. `Pipeline` of `@moe/parallel`
   * runs them. The shares of drafts that `mtpAcceptance` asks for are not measured.
   * @param stages 1 to layers + 1 + MTP modules
   * @param options.sequenceLength positions of a row, for the cost of attention. Default 1024.
   * @throws MoeError E_CONFIG
   */
  inStages(stages: number, options: { sequenceLength?: number } = {}): DeepSeekStages {
    checkOptions('DeepSeek.inStages', options, { sequenceLength: true })
    const { sequenceLength = 1024 } = options
    return new DeepSeekStages(this, stages, sequenceLength, this.#lossSource())
  }

  /**
   * The training loss of rows as `loss` has it, in pieces between which a rank may wait for others: for routed experts that lie on several ranks. `ExpertParallel` of `@moe/parallel` runs it.
   * The shares of drafts that `mtpAcceptance` asks for are not measured.
   */
  inPieces(rows: TokenRows): DeepSeekPieces {
    return new DeepSeekPieces(this, rows, this.#lossSource())
  }

  #lossSource(): LossSource {
    return {
      inputs: rows => {
        const { arrays, count } = this.#lossInputs(rows, true)
        return { arrays: { ...arrays, ...this.#factors() }, count }
      },
      balancer: this.#balancer !== null,
    }
  }

  /** What a batch alone decides. */
  #lossInputs(rows: TokenRows, training: boolean, from = 0) {
    return lossInputs(rows, rows.length - this.lookahead, training ? this.mtp.length : 0, {
      from,
      undropped: training ? this.#undropped?.(rows) : undefined,
    })
  }

  /** What the step decides. */
  #factors(): HostInputs {
    const { mtpWeight, balanceWeight } = this.#objective
    const data = Float32Array.of(scheduled(mtpWeight, this.step), scheduled(balanceWeight, this.step))
    return { factors: { data, shape: [2] } }
  }

  /** The ops of the loss. With `onLoad` the loads of the layers go there, in the order of `moeLayers`, and are not counted. */
  #lossOf(inputs: LossTensors, options: Pick<LayerOptions, 'training' | 'onLoad'>): Omit<DeepSeekLoss, 'count'> {
    const { training, onLoad } = options
    const { tokens, starts, weights, undropped } = inputs
    const [batch, length] = tokens.shape
    const time = length - this.lookahead
    const balance: Tensor[] = []
    const gather = (loss: Tensor) => balance.push(loss)
    const wanted = this.#balancer ? { onBalancerLoss: gather } : { onBalanceLoss: gather }
    const watched = training ? { training: !onLoad, undropped, onLoad, ...wanted } : {}
    const layerOptions = (depth: number): LayerOptions => ({ ...watched, starts, mask: maskAt(inputs, depth) })
    const hidden = this.hidden(idsAhead(inputs, time, 0), layerOptions(0))
    const head = denseWeight(this.lm_head.weight)
    const flat = hidden.reshape([batch * time, this.#config.hidden_size])
    const nlls = linearCrossEntropy(flat, head, targetsAt(inputs, 0))
    const nll = nlls.sum()
    let loss = (weights ? nlls.mul(weights).sum() : nll).mul(averageAt(inputs, 0))
    const metrics: Record<string, Tensor> = {}
    const { mtpDetached, mtpAcceptance: measured } = this.#objective
    // Weights are of what the main model says: modules learn to draft it from the texts alone.
    const detached = mtpDetached || weights !== undefined
    if (training && this.mtp.length > 0) {
      const mtp = mtpLoss(this.mtp, hidden, inputs, head, layerOptions, { detached })
      metrics.mtp = mtp.loss.detach()
      loss = loss.add(mtp.loss.mul(factorAt(inputs, 'mtp')))
      if (measured) {
        const { chained } = mtpAcceptance(this.mtp, hidden, inputs, head, { starts })
        for (const [k, rate] of chained.entries()) metrics[`acceptance${k + 1}`] = rate
      }
    }
    if (balance.length > 0) {
      const total = balance.reduce((sum, part) => sum.add(part))
      metrics.balance = total.mul(1 / balance.length).detach()
      loss = loss.add(this.#balancer ? total : total.mul(factorAt(inputs, 'balance')))
    }
    return { loss, nll: nll.detach(), nlls: nlls.detach(), metrics }
  }

  /**
   * Share of drafts that the main model would accept on rows of T + lookahead tokens, per depth: for evaluation. Nothing is counted or recorded.
   */
  mtpAcceptance(rows: TokenRows): MtpAcceptance {
    return this.infer(() => {
      const time = rows.length - this.lookahead
      const { starts } = uploadInputs(this.#lossInputs(rows, false).arrays, this.#backend)
      const ids = fromHost(shiftTokens(rows, time, 0).ids, [rows.rows, time], 'i32', this.#backend)
      return mtpAcceptance(this.mtp, this.hidden(ids, { starts }), rows, denseWeight(this.lm_head.weight), { starts })
    })
  }

  /** Layers with experts, MTP included. */
  get moeLayers(): MoELayer[] {
    return this.#namedMoeLayers.map(([, layer]) => layer)
  }

  get #namedMoeLayers(): Array<readonly [name: string, layer: MoELayer]> {
    return this.model.layers.flatMap((layer, i) => {
      const { mlp } = layer instanceof MtpModule ? (layer.block as DecoderLayer) : layer
      return mlp instanceof MoELayer ? [[`layers.${i}`, mlp] as const] : []
    })
  }

  /** Loads of the latest step, as `afterStep` has read them, of the layers that tokens have passed through. `train` logs them. */
  get layerLoads(): readonly LayerLoad[] {
    return this.#layerLoads
  }

  /**
   * Once per optimizer step: moves the selection biases by the loads of the whole batch. Resolves to what is worth logging: mean and largest MaxVio over the
   * layers, dead experts.
   * @param sum makes the loads `i32 [E]` of this rank those of all, where several train the model
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
        // Other ranks have run it.
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

  /** Ends the step; what `afterStep` resolves to. */
  async #report(counts: readonly StepCounts[]): Promise<Record<string, number>> {
    const biases = this.moeLayers.map(({ gate }) => this.#monitor && gate.e_score_correction_bias?.values())
    this.step += 1
    const { layerLoads, metrics } = await reportLoads(this.#namedMoeLayers, counts, biases, {
      monitor: this.#monitor,
      groups: this.#config.n_group ?? 1,
    })
    this.#layerLoads = layerLoads
    return metrics
  }

  /** Continues a sequence of token ids, as texts when a tokenizer is given. Greedy unless `temperature` is set. */
  generate(ids: ArrayLike<number>, options: TextOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: GenerateOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: GenerateOptions | TextOptions = {}): Generation<number | string> {
    return generate(this, ids, options)
  }

  /**
   * For several texts, such as the turns of a conversation: keeps what it has read, so that of a prompt that goes on where the last text ended only the rest is read.
   * Dispose it before the model.
   */
  session(options: SessionOptions = {}): Session {
    return new Session(this, options)
  }

  /** For many texts at once, as a server makes them: each pass has a token of every text. Dispose it before the model. */
  continuousBatch(options: ContinuousBatchOptions = {}): ContinuousBatch {
    return new ContinuousBatch(this, options)
  }

  /**
   * How likely the model finds each token of texts, given those before it; of a first one nothing is known. Nothing is made. Texts of about the same length go
   * through together. Sum up `logProb` over a continuation to compare it with others.
   * @throws MoeError E_ATTR
   */
  score(
    texts: ReadonlyArray<ArrayLike<number>>,
    options: ScoreOptions = {},
  ): Promise<Array<Array<TokenLogProb | null>>> {
    return score(this, texts, options)
  }

  /**
   * Writes config.json and model.safetensors in the Hugging Face layout. In a page `folder` is a handle, such as `await navigator.storage.getDirectory()`.
   * @throws MoeError E_UNSUPPORTED for a model with adapters, and for a path in a browser; E_CHECKPOINT for a folder that cannot be written
   */
  async save(folder: FolderPlace): Promise<void> {
    await savePretrained(this, folder)
  }

  /** Frees all weights and tables. */
  dispose(): void {
    for (const layer of this.model.layers) {
      const block = layer instanceof MtpModule ? (layer.block as DecoderLayer) : layer
      if (block.self_attn instanceof MultiHeadLatentAttention) block.self_attn.releaseAbsorbed()
    }
    for (const layer of this.moeLayers) layer.updateBias({ speed: 0 })
    this.#rotary.dispose()
    disposeModule(this)
  }

  /** Runs inference code: nothing is recorded, everything but the result is freed. Products in `precision`; default: that of the caller. */
  infer<T>(fn: () => T, options: { precision?: Precision } = {}): T {
    checkOptions('DeepSeek.infer', options, { precision: true })
    const { precision = currentPrecision() } = options
    return noGrad(() => withPrecision(precision, () => scope(fn)))
  }
}
