/** @file One decoder layer (pre-norm): attention, then experts or a dense feed-forward network, with residual connections. */
import {
  MultiHeadAttention,
  MultiHeadLatentAttention,
  type RotaryEmbedding,
  type SequenceCache,
} from '@moe/attention-mla'
import {
  checkpoint,
  checkShared,
  disposeAfterUse,
  forkInit,
  type InitOptions,
  isRecording,
  Module,
  type OptionNames,
  RmsNorm,
  SwigluMlp,
  scope,
  type Tensor,
  withKept,
  withRecomputed,
} from '@moe/core'
import { type Balancer, type MoEForwardOptions, MoELayer, type TokenDropping } from '@moe/router'
import { type DeepSeekConfig, isMoELayer, sharesIndexer } from './config.ts'

/** Options of a layer: those of the attention, and those of the MoE layer. */
export interface LayerOptions extends MoEForwardOptions {
  /** Cache of the earlier tokens, to which the new ones are added. Inference only. */
  readonly cache?: SequenceCache | undefined
  /** Index of the layer in the cache. */
  readonly layer?: number | undefined
  /** As in `MlaForwardOptions`: where the text of each token starts in its row. */
  readonly starts?: Tensor | undefined
  /** As in `MlaForwardOptions`: receives the loss of the indexer, `[B, T]`. Only for layers with sparse attention. */
  readonly onIndexerLoss?: ((loss: Tensor) => void) | undefined
  /** As in `MlaForwardOptions`: whether sparse attention covers all keys. */
  readonly dense?: boolean | undefined
  /** As in `MlaForwardOptions`: the keys that an earlier layer has selected. Only read by layers without an indexer. */
  readonly selected?: Tensor | undefined
  /** As in `MlaForwardOptions`: receives the selected keys. Only called by layers whose indexer is shared. */
  readonly onSelected?: ((selected: Tensor) => void) | undefined
}

export const layerNames: OptionNames<LayerOptions> = {
  cache: true,
  layer: true,
  starts: true,
  onIndexerLoss: true,
  dense: true,
  selected: true,
  onSelected: true,
  training: true,
  mask: true,
  undropped: true,
  onBalanceLoss: true,
  onBalancerLoss: true,
  onLoad: true,
}

/**
 * What the backward pass recomputes. `'whole'`: everything but the input of the layer. `'selective'`: what takes little time to compute and much memory to keep (V3 report 3.2.3 and 3.3.3): norms, queries, keys and values from latents, gated
 * activations, and tokens sorted by expert.
 */
export type LayerRecompute = 'whole' | 'selective'

export interface DecoderLayerInit extends InitOptions {
  readonly recompute?: LayerRecompute
  readonly balancer?: Balancer
  readonly dropping?: TokenDropping
}

/** A decoder layer (pre-norm): attention, then experts or a dense feed-forward network, with residual connections. `[B, T, hidden]` to the same shape. */
export class DecoderLayer extends Module {
  /** Latent attention, or multi-head attention if model_type is `llama`. */
  self_attn: MultiHeadLatentAttention | MultiHeadAttention
  /** Experts, or a dense network in the first `first_k_dense_replace` layers. */
  mlp: MoELayer | SwigluMlp
  /** Norm before the attention. */
  input_layernorm: RmsNorm
  /** Norm before the experts or the network. */
  post_attention_layernorm: RmsNorm
  readonly #recompute: LayerRecompute | undefined
  /** Whether the next layer shares the indexer of this one. */
  readonly #passesSelection: boolean

  /** @param layer index of the layer, which determines whether it has experts or a dense network */
  constructor(config: DeepSeekConfig, layer: number, rotary: RotaryEmbedding, options: DecoderLayerInit) {
    super()
    const { balancer, dropping, recompute, ...init } = options
    const { hidden_size: hidden, rms_norm_eps: eps } = config
    const own = { ...forkInit(init, 'self_attn'), rotary }
    this.self_attn =
      config.model_type === 'llama'
        ? new MultiHeadAttention({ ...config, head_dim: config.v_head_dim }, own)
        : new MultiHeadLatentAttention(config, { ...own, indexer: !sharesIndexer(config, layer) })
    this.mlp = isMoELayer(config, layer)
      ? new MoELayer({ ...config, ...experts(config) }, { ...forkInit(init, 'mlp'), balancer, dropping })
      : new SwigluMlp(hidden, config.intermediate_size, forkInit(init, 'mlp'))
    this.input_layernorm = new RmsNorm(hidden, eps, init)
    this.post_attention_layernorm = new RmsNorm(hidden, eps, init)
    this.#recompute = recompute
    this.#passesSelection = sharesIndexer(config, layer + 1)
    if (recompute !== 'selective') return
    if (this.self_attn instanceof MultiHeadLatentAttention) this.self_attn.recompute = true
    const { mlp } = this
    for (const net of mlp instanceof MoELayer ? [mlp.experts, mlp.shared_experts] : [mlp]) if (net) net.recompute = true
  }

  /** Runs the layer: `[B, T, hidden]` to the same shape. */
  forward(x: Tensor, options: LayerOptions): Tensor {
    checkShared('DecoderLayer.forward', options, layerNames)
    return this.whole(x, options, (input, own) => [this.#forward(input, own)])[0]
  }

  #forward(x: Tensor, options: LayerOptions): Tensor {
    const { cache, layer, starts, onIndexerLoss, dense, selected, onSelected, ...watched } = options
    const { mlp } = this
    const part = isTransient(options) ? scope : <T>(fn: () => T) => fn()
    const [out, passed] = part(() => {
      const [attended, passed] = part(() => {
        let passed: Tensor | undefined
        const seen = { cache, layer, starts, onIndexerLoss, dense, selected }
        const attended = this.attend(x, {
          ...seen,
          onSelected: keys => {
            passed = keys
          },
        })
        return [attended, passed] as const
      })
      const more = (normal: Tensor) => (mlp instanceof MoELayer ? mlp.forward(normal, watched) : mlp.forward(normal))
      return [plus(attended, this.#behind(this.post_attention_layernorm, attended, more)), passed] as const
    })
    if (passed) onSelected?.(passed)
    return out
  }

  /** Runs the first half of the layer: attention with its residual connection. The second half is `mlp` after `post_attention_layernorm`, likewise. */
  attend(x: Tensor, options: LayerOptions): Tensor {
    const { cache, layer, starts, onIndexerLoss, dense, selected } = options
    const { self_attn: attention } = this
    const onSelected = this.#passesSelection ? options.onSelected : undefined
    const seen = { cache, layer, starts }
    const run = (normal: Tensor) =>
      attention instanceof MultiHeadLatentAttention
        ? attention.forward(normal, { ...seen, onIndexerLoss, dense, selected, onSelected })
        : attention.forward(normal, seen)
    return plus(x, this.#behind(this.input_layernorm, x, run))
  }

  #behind(norm: RmsNorm, x: Tensor, fn: (normal: Tensor) => Tensor): Tensor {
    const through = this.#recompute === 'selective' ? withRecomputed : withKept
    return through(of => [norm.forward(of)], fn, x)
  }

  /**
   * Runs a part of this layer, with recomputation in the backward pass if the layer is configured so. Callbacks of the options are called once, outside of the recomputed function.
   * @param fn receives options to use instead of `options`. It must return integer tensors last.
   */
  whole(
    input: Tensor,
    options: LayerOptions,
    fn: (input: Tensor, options: LayerOptions) => readonly Tensor[],
  ): readonly Tensor[] {
    if (this.#recompute !== 'whole' || !isRecording()) return fn(input, options)
    let callbacks: Array<(tensor: Tensor) => void> = []
    let own = 0
    const made = checkpoint(x => {
      const losses: Reported[] = []
      const integers: Reported[] = []
      const collect = (among: Reported[], callback?: (tensor: Tensor) => void) =>
        callback && ((tensor: Tensor) => void among.push({ tensor, callback }))
      const results = fn(x, {
        ...options,
        onBalanceLoss: collect(losses, options.onBalanceLoss),
        onBalancerLoss: collect(losses, options.onBalancerLoss),
        onIndexerLoss: collect(losses, options.onIndexerLoss),
        onLoad: collect(integers, options.onLoad),
        onSelected: collect(integers, options.onSelected),
      })
      own = results.length
      // Reported only once, not again when recomputed.
      const all = [...losses, ...integers]
      callbacks = all.map(({ callback }) => callback)
      return [...results, ...all.map(({ tensor }) => tensor)]
    }, input)
    for (const [i, callback] of callbacks.entries()) callback(made[own + i])
    return made.slice(0, own)
  }
}

/** x + y, where no backward pass needs y. */
function plus(x: Tensor, y: Tensor): Tensor {
  const sum = x.add(y)
  disposeAfterUse(y)
  return sum
}

/** A value for a callback. */
interface Reported {
  readonly tensor: Tensor
  readonly callback: (tensor: Tensor) => void
}

/** Whether intermediate results can be freed early, because neither gradients nor callbacks need them. */
export const isTransient = ({ onLoad, onBalanceLoss, onBalancerLoss, onIndexerLoss }: LayerOptions): boolean =>
  !isRecording() && !onLoad && !onBalanceLoss && !onBalancerLoss && !onIndexerLoss

/** The two fields that are not null in a configuration with experts. */
function experts(config: DeepSeekConfig): { n_routed_experts: number; num_experts_per_tok: number } {
  return {
    n_routed_experts: config.n_routed_experts as number,
    num_experts_per_tok: config.num_experts_per_tok as number,
  }
}
