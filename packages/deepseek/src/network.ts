/**
 * @file The network: embedding, decoder layers, MTP modules, final norm and head, with its forward pass and caches. Keys are those of the released checkpoints.
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
  type SequenceCache,
} from '@moe/attention-mla'
import {
  type Backend,
  checkOptions,
  checkShared,
  currentPrecision,
  disposeModule,
  disposeOnError,
  type Linear,
  Module,
  needAxes,
  noGrad,
  type Precision,
  scope,
  type Tensor,
  withPrecision,
} from '@moe/core'
import type { MtpModule } from '@moe/mtp'
import { MoELayer } from '@moe/router'
import type { DeepSeekConfig } from './config.ts'
import { type DecoderLayer, isTransient, type LayerOptions, layerNames } from './decoder-layer.ts'
import type { RemoteExperts } from './remote-experts.ts'
import { makeTrunk, type Trunk, type TrunkInit } from './trunk.ts'

/** Tokens `i32 [B, T]` to process, and how. */
interface HiddenInput {
  readonly depth: number
  readonly ids: Tensor
  readonly states?: Tensor | undefined
  readonly cache?: SequenceCache | undefined
}

/** The modules of a model and its forward pass. `DeepSeek` adds training, generation, loading and saving. */
export class Network extends Module {
  /** The modules under `model.` in checkpoints: `embed_tokens`, `layers` (decoder layers, then MTP modules) and `norm`. */
  model: Trunk
  /** Folder that the weights were loaded from. Saved adapters name it as their base model. */
  source?: string
  /** If the routed experts are on other ranks: how inference reaches them. `ExpertParallel.lead` of `@moe/parallel` sets it. */
  remoteExperts: RemoteExperts | null = null
  /** Output head, `[vocab_size, hidden_size]`; shares the weight of the embedding if they are tied. */
  lm_head: Linear
  readonly #config: DeepSeekConfig
  readonly #backend: Backend
  readonly #rotary: RotaryEmbedding

  constructor(config: DeepSeekConfig, init: TrunkInit & { readonly backend: Backend }) {
    super()
    this.#config = config
    this.#backend = init.backend
    this.#rotary = new RotaryEmbedding(config)
    const { model, head } = disposeOnError(() => makeTrunk(config, this.#rotary, init))
    this.model = model
    this.lm_head = head
  }

  /** The validated configuration, with defaults filled in. */
  get config(): DeepSeekConfig {
    return this.#config
  }

  /** Backend of the weights. */
  get backend(): Backend {
    return this.#backend
  }

  /** Decoder layers of the main model. */
  get decoder(): readonly DecoderLayer[] {
    return this.model.layers.slice(0, this.#config.num_hidden_layers) as DecoderLayer[]
  }

  /** MTP modules, starting with depth 1. */
  get mtp(): ReadonlyArray<MtpModule<LayerOptions>> {
    return this.model.layers.slice(this.#config.num_hidden_layers) as MtpModule<LayerOptions>[]
  }

  /** Number of tokens that a training row needs beyond its trained positions. */
  get lookahead(): number {
    return 1 + this.#config.num_nextn_predict_layers
  }

  /** Returns the logits of every position: `i32 [B, T]` to `[B, T, V]`. */
  forward(ids: Tensor, options: Pick<LayerOptions, 'cache'> = {}): Tensor {
    checkOptions('DeepSeek.forward', options, { cache: true })
    return this.lm_head.forward(this.hidden(ids, options))
  }

  /** Returns the hidden states after the final norm, `i32 [B, T]` to `[B, T, D]`. With a cache, the new tokens are added to it. */
  hidden(ids: Tensor, options: LayerOptions = {}): Tensor {
    needAxes('DeepSeek', ids, ['batch', 'time'])
    checkShared('DeepSeek.hidden', options, layerNames)
    let x = this.model.embed_tokens.forward(ids)
    let selected: Tensor | undefined
    this.decoder.forEach((layer, i) => {
      const [before, received] = [x, selected]
      const onSelected = (keys: Tensor) => {
        selected = keys
      }
      x = layer.forward(before, { ...options, layer: i, selected, onSelected })
      if (!isTransient(options)) return
      before.dispose()
      if (received !== selected) received?.dispose()
    })
    if (isTransient(options)) selected?.dispose()
    options.cache?.advance(ids.shape[1])
    return this.model.norm.forward(x)
  }

  /**
   * Returns hidden states after the norm, `[B, T, D]`: of the main model, or, at depth k, of its k-th MTP module, which continues from `states [B, T, D]` with
   * the tokens k places ahead. With a cache, the new tokens are added to it. @internal
   */
  hiddenAt({ depth, ids, states, cache }: HiddenInput): Tensor {
    if (depth === 0) return this.hidden(ids, { cache })
    const module = this.mtp[depth - 1]
    const layer = this.decoder.length + depth - 1
    const hidden = module.normalize(module.forward(states as Tensor, ids, { cache, layer }))
    cache?.advance(ids.shape[1])
    return hidden
  }

  /** Creates a cache for the decoder layers and the first `depth` MTP modules (default 0). It stores latents, or keys and values in a dense model. */
  makeCache(options: Pick<CacheOptions, 'batch' | 'capacity' | 'dtype'> & { readonly depth?: number } = {}): KvCache {
    checkOptions('DeepSeek.makeCache', options, { batch: true, capacity: true, dtype: true, depth: true })
    const { depth = 0, ...memory } = options
    return new KvCache(this.decoder[0].self_attn.cacheFeatures, { ...memory, ...this.#cacheOptions(depth) })
  }

  /** Creates a paged cache, for sequences that start and end independently; includes the first `depth` MTP modules (default 0). */
  makePagedCache(
    options: Pick<PagedCacheOptions, 'tokens' | 'pageSize' | 'dtype'> & { readonly depth?: number },
  ): PagedCache {
    checkOptions('DeepSeek.makePagedCache', options, { tokens: true, pageSize: true, dtype: true, depth: true })
    const { depth = 0, ...memory } = options
    const features = this.decoder[0].self_attn.cacheFeatures
    return new PagedCache(features, { ...memory, ...this.#cacheOptions(depth), lookahead: depth })
  }

  #cacheOptions(depth: number) {
    const layers = this.#config.num_hidden_layers + depth
    return { layers, indexLayers: this.indexedLayers.filter(layer => layer < layers), backend: this.#backend }
  }

  /** The decoder layers, then those of the MTP modules. @internal */
  get blocks(): DecoderLayer[] {
    return [...this.decoder, ...this.mtp.map(blockOf)]
  }

  /** Indices of the layers with an indexer, including those of MTP modules. @internal */
  get indexedLayers(): number[] {
    return this.blocks.flatMap(({ self_attn: attention }, i) =>
      attention instanceof MultiHeadLatentAttention && attention.indexer !== undefined ? [i] : [],
    )
  }

  /** All MoE layers, including those of MTP modules. */
  get moeLayers(): MoELayer[] {
    return this.blocks.flatMap(({ mlp }) => (mlp instanceof MoELayer ? [mlp] : []))
  }

  /** Frees all weights and tables. */
  dispose(): void {
    for (const { self_attn: attention } of this.blocks) {
      if (attention instanceof MultiHeadLatentAttention) attention.releaseAbsorbed()
    }
    for (const layer of this.moeLayers) layer.updateBias({ speed: 0 })
    this.#rotary.dispose()
    disposeModule(this)
  }

  /** Runs `fn` for inference: no gradients are recorded, and all tensors but the result are freed. `precision` is that of matrix products; default: that of the caller. */
  infer<T>(fn: () => T, options: { precision?: Precision } = {}): T {
    checkOptions('DeepSeek.infer', options, { precision: true })
    const { precision = currentPrecision() } = options
    return noGrad(() => withPrecision(precision, () => scope(fn)))
  }
}

/** Returns the decoder layer of an MTP module. */
export const blockOf = (module: MtpModule<LayerOptions>): DecoderLayer => module.block as DecoderLayer
