/**
 * @file The whole model: embedding, decoder layers, MTP modules behind them, final norm and head. Keys are those of the released checkpoints.
 *
 * Legend: B batch, T time, D hidden size, V vocabulary.
 */
import {
  type CacheOptions,
  type KvCache,
  LatentCache,
  MultiHeadAttention,
  MultiHeadLatentAttention,
  RotaryEmbedding,
} from '@moe/attention-mla'
import {
  type Backend,
  defaultBackend,
  denseWeight,
  disposeModule,
  Embedding,
  forkInit,
  fromHost,
  type InitOptions,
  Linear,
  linearCrossEntropy,
  Module,
  noGrad,
  Random,
  RmsNorm,
  scope,
  type Tensor,
  type WeightFormat,
} from '@moe/core'
import { type MtpAcceptance, MtpModule, mtpAcceptance, mtpLoss, shiftTokens, type TokenRows } from '@moe/mtp'
import {
  type Balancer,
  type LoadMonitor,
  MoELayer,
  type Schedule,
  scheduled,
  summarizeLoad,
  type TokenDropping,
} from '@moe/router'
import { type DeepSeekConfig, type DeepSeekConfigInput, parseConfig } from './config.ts'
import { DecoderLayer, type DecoderLayerInit, type LayerOptions } from './decoder-layer.ts'
import { type GenerateOptions, type Generation, generate, type TextOptions } from './generate.ts'
import { loadPretrained, savePretrained } from './pretrained.ts'

/**
 * What the training loss adds to the next-token loss, and how fast the balance bias moves. Numbers, or functions of the optimizer steps done (`model.step`);
 * may be changed between steps.
 */
export interface Objective {
  /** λ of multi-token prediction (V3: 0.3, later 0.1). */
  mtpWeight: Schedule
  /** α of the sequence-wise balance loss (V3: 1e-4). Not used with a balancer. */
  balanceWeight: Schedule
  /** γ of the selection bias (V3: 0.001). Not used with a balancer. */
  biasSpeed: Schedule
  /** Train the MTP modules alone: they give no gradient to the main model. Default false. */
  mtpDetached: boolean
  /** Log the share of drafts that the main model would accept at every depth with each training loss. It costs the logits of all depths. Default false. */
  mtpAcceptance: boolean
}

export interface DeepSeekOptions {
  readonly seed?: number
  readonly backend?: Backend
  /** Store weights in fewer bits, for inference: see `quantizeWeights`. Checkpoints are quantized tensor by tensor as they are read. Default: f32. */
  readonly weights?: WeightFormat
  readonly objective?: Partial<Objective>
  /** What keeps the experts evenly loaded, in place of `balanceWeight` and `biasSpeed`. */
  readonly balancer?: Balancer
  /** Drop in training what exceeds the budget of a device, as V2 did. Default: no token is dropped. */
  readonly dropping?: TokenDropping & {
    /** Share of the sequences that lose no token in any layer, drawn anew for every batch from the seed and the step. Default 0.1. */
    readonly undropped?: number
  }
  /** Is given the loads and selection biases of every layer after each step. */
  readonly monitor?: LoadMonitor
}

/** The loss of a batch and what to log beside it. */
export interface DeepSeekLoss {
  /** Scalar to minimise. */
  readonly loss: Tensor
  /** Sum of the next-token negative log-likelihoods in nats, detached. */
  readonly nll: Tensor
  /** Positions in that sum. */
  readonly count: number
  /**
   * Detached scalars: `mtp` (mean over depths), `balance` (mean over layers, without α; of a balancer with its factors), and when asked for
   * `acceptance1` and so on, the share of drafts accepted at each depth together with the shallower ones.
   */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** The part under the key `model`. */
class Trunk extends Module {
  embed_tokens: Embedding
  /** Decoder layers, then MTP modules, as in the checkpoints. */
  layers: Array<DecoderLayer | MtpModule<LayerOptions>>
  norm: RmsNorm

  constructor(config: DeepSeekConfig, rotary: RotaryEmbedding, options: DecoderLayerInit) {
    super()
    const { balancer, dropping, ...init } = options
    this.embed_tokens = new Embedding(config.vocab_size, config.hidden_size, forkInit(init, 'embed_tokens'))
    this.layers = Array.from(
      { length: config.num_hidden_layers },
      (_, i) => new DecoderLayer(config, i, rotary, { ...forkInit(init, `layers.${i}`), balancer, dropping }),
    )
    this.norm = new RmsNorm(config.hidden_size, config.rms_norm_eps, init)
  }
}

/** A DeepSeek V2, V3 or LLM language model of any size. */
export class DeepSeek extends Module {
  model: Trunk
  lm_head: Linear
  readonly #config: DeepSeekConfig
  readonly #backend: Backend
  readonly #rotary: RotaryEmbedding
  readonly #objective: Objective
  readonly #balancer: Balancer | null
  readonly #monitor: LoadMonitor | null
  /** Which sequences of a batch lose no token, `[B]`: 1 or 0. Null without dropping. */
  readonly #undropped: ((batch: number) => Float32Array) | null
  /** Batches of the current step so far. */
  #batches = 0
  /** Optimizer steps done, for schedules: `afterStep` counts. Set it when a run is resumed. */
  step = 0

  /**
   * A model with random weights; the same seed gives the same weights on every backend.
   * @throws MoeError E_CONFIG with every fault of the configuration in one message.
   */
  constructor(config: DeepSeekConfigInput, options: DeepSeekOptions = {}) {
    super()
    const { seed = 0, backend = defaultBackend(), weights, objective, balancer, dropping, monitor = null } = options
    this.#config = parseConfig(config)
    this.#backend = backend
    const usual = { mtpWeight: 0.3, balanceWeight: 1e-4, biasSpeed: 0.001, mtpDetached: false, mtpAcceptance: false }
    this.#objective = { ...usual, ...objective }
    this.#balancer = balancer ?? null
    this.#monitor = monitor
    const share = dropping?.undropped ?? 0.1
    const draw = (batch: number) => new Random(seed).fork(`undropped/${this.step}/${this.#batches++}`).uniform(batch)
    this.#undropped = dropping ? batch => draw(batch).map(x => (x < share ? 1 : 0)) : null
    const init: InitOptions = { random: new Random(seed), deviation: this.#config.initializer_range, backend, weights }
    this.#rotary = new RotaryEmbedding(this.#config)
    this.model = new Trunk(this.#config, this.#rotary, { ...init, balancer, dropping })
    this.lm_head = new Linear(this.#config.hidden_size, this.#config.vocab_size, forkInit(init, 'lm_head'))
    if (this.#config.tie_word_embeddings) {
      this.lm_head.weight.dispose()
      this.lm_head.weight = this.model.embed_tokens.weight
    }
    this.#addMtp({ ...init, balancer, dropping })
  }

  /** MTP modules stand behind the decoder layers and share embedding and head. */
  #addMtp({ balancer, dropping, ...init }: DecoderLayerInit): void {
    const config = this.#config
    const { layers, embed_tokens: embedding } = this.model
    for (let depth = 0; depth < config.num_nextn_predict_layers; depth++) {
      const index = config.num_hidden_layers + depth
      const makeBlock = (own: InitOptions) =>
        new DecoderLayer(config, index, this.#rotary, { ...own, balancer, dropping })
      const own = forkInit(init, `layers.${index}`)
      const separate = config.mtp_separate_embeddings
      layers.push(new MtpModule<LayerOptions>(config, { ...own, embedding, head: this.lm_head, makeBlock, separate }))
    }
  }

  /** Opens a checkpoint in the Hugging Face layout: a folder with config.json and safetensors. */
  static async fromPretrained(folder: string, options: Omit<DeepSeekOptions, 'seed'> = {}): Promise<DeepSeek> {
    return loadPretrained(folder, config => new DeepSeek(config, options))
  }

  get config(): DeepSeekConfig {
    return this.#config
  }

  get backend(): Backend {
    return this.#backend
  }

  get objective(): Objective {
    return this.#objective
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

  /** Tokens that a training row needs beyond the positions that are trained on. */
  get lookahead(): number {
    return 1 + this.#config.num_nextn_predict_layers
  }

  /** Logits of every position: `i32 [B, T]` to `[B, T, V]`. */
  forward(ids: Tensor, options: Pick<LayerOptions, 'cache'> = {}): Tensor {
    return this.lm_head.forward(this.hidden(ids, options))
  }

  /** Hidden states after the final norm, `i32 [B, T]` to `[B, T, D]`. With a cache, the new tokens are added to it. */
  hidden(ids: Tensor, options: LayerOptions = {}): Tensor {
    let x = this.model.embed_tokens.forward(ids)
    this.decoder.forEach((layer, i) => {
      x = layer.forward(x, { ...options, layer: i })
    })
    options.cache?.advance(ids.shape[1])
    return this.model.norm.forward(x)
  }

  /** A cache for this model's decoder layers: latent, or keys and values in a dense model. */
  makeCache(options: Pick<CacheOptions, 'batch' | 'capacity' | 'dtype'> = {}): KvCache {
    const all = { ...options, layers: this.#config.num_hidden_layers, backend: this.#backend }
    const { self_attn: attention } = this.decoder[0]
    return attention instanceof MultiHeadAttention ? attention.makeCache(all) : new LatentCache(this.#config, all)
  }

  /**
   * Training loss of rows of T + lookahead tokens: mean next-token cross-entropy + λ MTP + α balance. With `training: false` only the first, and no load is
   * counted. Positions below `from` carry no loss.
   */
  loss(rows: TokenRows, options: { training?: boolean; from?: number } = {}): DeepSeekLoss {
    const { training = true, from = 0 } = options
    const { rows: batch, length } = rows
    const time = length - this.lookahead
    const balance: Tensor[] = []
    const layerOptions = this.#layerOptions(rows, time, training, loss => balance.push(loss))
    const hidden = this.#states(rows, time, layerOptions(0))
    const { targets, count } = shiftTokens(rows, time, 1, { from })
    const head = denseWeight(this.lm_head.weight)
    const nll = linearCrossEntropy(
      hidden.reshape([batch * time, this.#config.hidden_size]),
      head,
      fromHost(targets, [batch * time], 'i32', this.#backend),
    ).sum()
    let loss = nll.mul(1 / Math.max(1, count))
    const metrics: Record<string, Tensor> = {}
    const { mtpWeight, balanceWeight, mtpDetached: detached, mtpAcceptance: measured } = this.#objective
    if (training && this.mtp.length > 0) {
      const mtp = mtpLoss(this.mtp, hidden, rows, head, layerOptions, { detached })
      metrics.mtp = mtp.loss.detach()
      loss = loss.add(mtp.loss.mul(scheduled(mtpWeight, this.step)))
      if (measured) {
        const { chained } = mtpAcceptance(this.mtp, hidden, rows, head, {})
        for (const [k, rate] of chained.entries()) metrics[`acceptance${k + 1}`] = rate
      }
    }
    if (balance.length > 0) {
      const total = balance.reduce((sum, part) => sum.add(part))
      metrics.balance = total.mul(1 / balance.length).detach()
      loss = loss.add(this.#balancer ? total : total.mul(scheduled(balanceWeight, this.step)))
    }
    return { loss, nll: nll.detach(), count, metrics }
  }

  /** Hidden states `[B, T, D]` of the first T tokens of rows. */
  #states(rows: TokenRows, time: number, options: LayerOptions): Tensor {
    const { ids } = shiftTokens(rows, time, 0)
    return this.hidden(fromHost(ids, [rows.rows, time], 'i32', this.#backend), options)
  }

  /**
   * How layers run over the first T tokens of rows: padding (documents with negative numbers) masked, the losses of balancing gathered in training.
   * MTP modules at depth k take the tokens k places ahead.
   */
  #layerOptions(rows: TokenRows, time: number, training: boolean, gather: (loss: Tensor) => void) {
    const { rows: batch, length, documents } = rows
    const padded = documents.some(document => document < 0)
    const spared = training && this.#undropped?.(batch)
    const undropped = spared ? fromHost(spared, [batch], 'f32', this.#backend) : undefined
    return (depth: number): LayerOptions => {
      let mask: Tensor | undefined
      if (padded) {
        const real = new Float32Array(batch * time)
        for (let i = 0; i < real.length; i++) {
          real[i] = documents[Math.floor(i / time) * length + (i % time) + depth] < 0 ? 0 : 1
        }
        mask = fromHost(real, [batch, time], 'f32', this.#backend)
      }
      if (!training) return { training, mask }
      const common = { training, mask, undropped }
      return this.#balancer ? { ...common, onBalancerLoss: gather } : { ...common, onBalanceLoss: gather }
    }
  }

  /**
   * Share of drafts that the main model would accept on rows of T + lookahead tokens, per depth: for evaluation. Nothing is counted or recorded.
   */
  mtpAcceptance(rows: TokenRows): MtpAcceptance {
    return this.infer(() => {
      const time = rows.length - this.lookahead
      return mtpAcceptance(this.mtp, this.#states(rows, time, {}), rows, denseWeight(this.lm_head.weight), {})
    })
  }

  /** Layers with experts, MTP included. */
  get moeLayers(): MoELayer[] {
    return this.model.layers
      .map(layer => (layer instanceof MtpModule ? (layer.block as DecoderLayer).mlp : layer.mlp))
      .filter(mlp => mlp instanceof MoELayer)
  }

  /**
   * Once per optimizer step: moves the selection biases by the loads of the whole batch. Resolves to what is worth logging: mean and largest MaxVio over the
   * layers, dead experts.
   */
  async afterStep(): Promise<Record<string, number>> {
    const speed = scheduled(this.#objective.biasSpeed, this.step)
    const loads = this.moeLayers.map(async (layer, i) => {
      const load = layer.load?.values()
      if (layer.balancer) layer.rebalance({ step: this.step })
      else layer.updateBias({ speed })
      const bias = this.#monitor && layer.gate.e_score_correction_bias?.values()
      const values = await load
      if (values) this.#monitor?.record(`moe ${i}`, values, (await bias) ?? undefined)
      return values
    })
    this.step++
    this.#batches = 0
    const summaries = (await Promise.all(loads)).filter(load => load !== undefined).map(summarizeLoad)
    if (summaries.length === 0) return {}
    const vio = summaries.map(({ maxVio }) => maxVio)
    return {
      maxVio: vio.reduce((sum, x) => sum + x, 0) / vio.length,
      maxVioWorst: Math.max(...vio),
      deadExperts: summaries.reduce((sum, { dead }) => sum + dead.length, 0),
    }
  }

  /** Continues a sequence of token ids, as texts when a tokenizer is given. Greedy unless `temperature` is set. */
  generate(ids: ArrayLike<number>, options: TextOptions): Generation<string>
  generate(ids: ArrayLike<number>, options?: GenerateOptions): Generation<number>
  generate(ids: ArrayLike<number>, options: GenerateOptions | TextOptions = {}): Generation<number | string> {
    return generate(this, ids, options)
  }

  /** Writes config.json and model.safetensors in the Hugging Face layout. */
  async save(folder: string): Promise<void> {
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

  /** Runs inference code: nothing is recorded, everything but the result is freed. */
  infer<T>(fn: () => T): T {
    return noGrad(() => scope(fn))
  }
}
