/** @file One transformer block: MLA (multi-head attention in a dense model), then experts (or a dense net in the leading layers), each behind a norm and added to its input. */
import {
  MultiHeadAttention,
  MultiHeadLatentAttention,
  type RotaryEmbedding,
  type SequenceCache,
} from '@moe/attention-mla'
import {
  checkShared,
  forkInit,
  type InitOptions,
  isRecording,
  Module,
  type OptionNames,
  RmsNorm,
  SwigluMlp,
  scope,
  type Tensor,
} from '@moe/core'
import { type Balancer, type MoEForwardOptions, MoELayer, type TokenDropping } from '@moe/router'
import { type DeepSeekConfig, isMoELayer } from './config.ts'

/** Options of the attention (cache) and of the experts (training, mask, losses and loads to watch). */
export interface LayerOptions extends MoEForwardOptions {
  /** Earlier tokens; the new ones are written to it. Inference only. */
  readonly cache?: SequenceCache
  /** Layer of the cache. */
  readonly layer?: number
  /** As `MlaForwardOptions` has it: where the text of each token begins in its row. */
  readonly starts?: Tensor
}

export const layerNames: OptionNames<LayerOptions> = {
  cache: true,
  layer: true,
  starts: true,
  training: true,
  mask: true,
  undropped: true,
  onBalanceLoss: true,
  onBalancerLoss: true,
  onLoad: true,
}

export interface DecoderLayerInit extends InitOptions {
  readonly balancer?: Balancer
  readonly dropping?: TokenDropping
}

/** A layer of the model (pre-norm): attention, then experts or a dense net, each added to its input. `[B, T, hidden]` to the same shape. */
export class DecoderLayer extends Module {
  /** Latent attention; multi-head attention where model_type is `llama`. */
  self_attn: MultiHeadLatentAttention | MultiHeadAttention
  /** Experts, or a dense net in the first `first_k_dense_replace` layers. */
  mlp: MoELayer | SwigluMlp
  /** Norm before attention. */
  input_layernorm: RmsNorm
  /** Norm before experts or net. */
  post_attention_layernorm: RmsNorm

  /** `layer` decides between experts and a dense net. */
  constructor(config: DeepSeekConfig, layer: number, rotary: RotaryEmbedding, options: DecoderLayerInit) {
    super()
    const { balancer, dropping, ...init } = options
    const { hidden_size: hidden, rms_norm_eps: eps } = config
    const own = { ...forkInit(init, 'self_attn'), rotary }
    this.self_attn =
      config.model_type === 'llama'
        ? new MultiHeadAttention({ ...config, head_dim: config.v_head_dim }, own)
        : new MultiHeadLatentAttention(config, own)
    this.mlp = isMoELayer(config, layer)
      ? new MoELayer({ ...config, ...experts(config) }, { ...forkInit(init, 'mlp'), balancer, dropping })
      : new SwigluMlp(hidden, config.intermediate_size, forkInit(init, 'mlp'))
    this.input_layernorm = new RmsNorm(hidden, eps, init)
    this.post_attention_layernorm = new RmsNorm(hidden, eps, init)
  }

  /** `[B, T, hidden]` to the same shape. */
  forward(x: Tensor, options: LayerOptions): Tensor {
    checkShared('DecoderLayer.forward', options, layerNames)
    const { cache, layer, starts, ...watched } = options
    const part = isTransient(options) ? scope : <T>(fn: () => T) => fn()
    return part(() => {
      const attended = part(() => this.attend(x, { cache, layer, starts }))
      const normal = this.post_attention_layernorm.forward(attended)
      return attended.add(this.mlp instanceof MoELayer ? this.mlp.forward(normal, watched) : this.mlp.forward(normal))
    })
  }

  /** The first half of `forward`: attention, added to its input. The other half is `mlp` behind `post_attention_layernorm`, added likewise. */
  attend(x: Tensor, options: LayerOptions): Tensor {
    return x.add(this.self_attn.forward(this.input_layernorm.forward(x), options))
  }
}

/** Whether nobody needs what a layer makes on the way to its result: no gradient is wanted, and nobody watches. */
export const isTransient = ({ onLoad, onBalanceLoss, onBalancerLoss }: LayerOptions): boolean =>
  !isRecording() && !onLoad && !onBalanceLoss && !onBalancerLoss

/** The two numbers that a configuration with experts is known to have. */
function experts(config: DeepSeekConfig): { n_routed_experts: number; num_experts_per_tok: number } {
  return {
    n_routed_experts: config.n_routed_experts as number,
    num_experts_per_tok: config.num_experts_per_tok as number,
  }
}
