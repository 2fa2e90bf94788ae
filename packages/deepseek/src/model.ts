/**
 * @file The whole model: embedding, decoder layers, MTP modules behind them, final norm and head. Keys are those of the released checkpoints.
 *
 * Legend: B batch, T time, D hidden size, V vocabulary.
 */
import { LatentCache as Cache, type LatentCache, RotaryEmbedding } from '@moe/attention-mla'
import {
  type Backend,
  defaultBackend,
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
} from '@moe/core'
import { MtpModule, mtpLoss, shiftTokens, type TokenRows } from '@moe/mtp'
import { MoELayer, summarizeLoad } from '@moe/router'
import { type DeepSeekConfig, type DeepSeekConfigInput, parseConfig } from './config.ts'
import { DecoderLayer, type LayerOptions } from './decoder-layer.ts'
import { type GenerateOptions, type Generation, generate, type TextOptions } from './generate.ts'
import { loadPretrained, savePretrained } from './pretrained.ts'

/** What the training loss adds to the next-token loss, and how fast the balance bias moves. Change it between steps for schedules. */
export interface Objective {
  /** λ of multi-token prediction (V3: 0.3, later 0.1). */
  mtpWeight: number
  /** α of the sequence-wise balance loss (V3: 1e-4). */
  balanceWeight: number
  /** γ of the selection bias (V3: 0.001). */
  biasSpeed: number
}

export interface DeepSeekOptions {
  readonly seed?: number
  readonly backend?: Backend
  readonly objective?: Partial<Objective>
}

/** The loss of a batch and what to log beside it. */
export interface DeepSeekLoss {
  /** Scalar to minimise. */
  readonly loss: Tensor
  /** Sum of the next-token negative log-likelihoods in nats, detached. */
  readonly nll: Tensor
  /** Positions in that sum. */
  readonly count: number
  /** Detached scalars: `mtp` (mean over depths), `balance` (mean over layers, without α). */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** The part under the key `model`. */
class Trunk extends Module {
  embed_tokens: Embedding
  /** Decoder layers, then MTP modules, as in the checkpoints. */
  layers: Array<DecoderLayer | MtpModule<LayerOptions>>
  norm: RmsNorm

  constructor(config: DeepSeekConfig, rotary: RotaryEmbedding, init: InitOptions) {
    super()
    this.embed_tokens = new Embedding(config.vocab_size, config.hidden_size, forkInit(init, 'embed_tokens'))
    this.layers = Array.from(
      { length: config.num_hidden_layers },
      (_, i) => new DecoderLayer(config, i, rotary, forkInit(init, `layers.${i}`)),
    )
    this.norm = new RmsNorm(config.hidden_size, config.rms_norm_eps, init)
  }
}

/** A DeepSeek V2 or V3 language model of any size. */
export class DeepSeek extends Module {
  model: Trunk
  lm_head: Linear
  readonly #config: DeepSeekConfig
  readonly #backend: Backend
  readonly #rotary: RotaryEmbedding
  readonly #objective: Objective

  /**
   * A model with random weights; the same seed gives the same weights on every backend.
   * @throws MoeError E_CONFIG with every fault of the configuration in one message.
   */
  constructor(config: DeepSeekConfigInput, options: DeepSeekOptions = {}) {
    super()
    const { seed = 0, backend = defaultBackend(), objective } = options
    this.#config = parseConfig(config)
    this.#backend = backend
    this.#objective = { mtpWeight: 0.3, balanceWeight: 1e-4, biasSpeed: 0.001, ...objective }
    const init: InitOptions = { random: new Random(seed), deviation: this.#config.initializer_range, backend }
    this.#rotary = new RotaryEmbedding(this.#config)
    this.model = new Trunk(this.#config, this.#rotary, init)
    this.lm_head = new Linear(this.#config.hidden_size, this.#config.vocab_size, forkInit(init, 'lm_head'))
    if (this.#config.tie_word_embeddings) {
      this.lm_head.weight.dispose()
      this.lm_head.weight = this.model.embed_tokens.weight
    }
    this.#addMtp(init)
  }

  /** MTP modules stand behind the decoder layers and share embedding and head. */
  #addMtp(init: InitOptions): void {
    const config = this.#config
    const { layers, embed_tokens: embedding } = this.model
    for (let depth = 0; depth < config.num_nextn_predict_layers; depth++) {
      const index = config.num_hidden_layers + depth
      const makeBlock = (own: InitOptions) => new DecoderLayer(config, index, this.#rotary, own)
      const own = forkInit(init, `layers.${index}`)
      layers.push(new MtpModule<LayerOptions>(config, { ...own, embedding, head: this.lm_head, makeBlock }))
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

  /** A latent cache for this model's decoder layers. */
  makeCache(options: { batch?: number; capacity?: number } = {}): LatentCache {
    return new Cache(this.#config, { ...options, layers: this.#config.num_hidden_layers, backend: this.#backend })
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
    const layerOptions: LayerOptions = training ? { training, onBalanceLoss: loss => balance.push(loss) } : { training }
    const { ids } = shiftTokens(rows, time, 0)
    const hidden = this.hidden(fromHost(ids, [batch, time], 'i32', this.#backend), layerOptions)
    const { targets, count } = shiftTokens(rows, time, 1, { from })
    const nll = linearCrossEntropy(
      hidden.reshape([batch * time, this.#config.hidden_size]),
      this.lm_head.weight,
      fromHost(targets, [batch * time], 'i32', this.#backend),
    ).sum()
    let loss = nll.mul(1 / Math.max(1, count))
    const metrics: Record<string, Tensor> = {}
    if (training && this.mtp.length > 0) {
      const mtp = mtpLoss(this.mtp, hidden, rows, this.lm_head.weight, layerOptions)
      metrics.mtp = mtp.loss.detach()
      loss = loss.add(mtp.loss.mul(this.#objective.mtpWeight))
    }
    if (balance.length > 0) {
      const total = balance.reduce((sum, part) => sum.add(part))
      metrics.balance = total.mul(1 / balance.length).detach()
      loss = loss.add(total.mul(this.#objective.balanceWeight))
    }
    return { loss, nll: nll.detach(), count, metrics }
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
    const loads = this.moeLayers.map(async layer => {
      const load = layer.load?.values()
      layer.updateBias({ speed: this.#objective.biasSpeed })
      return load
    })
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
      block.self_attn.releaseAbsorbed()
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
