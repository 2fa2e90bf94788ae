/** @file One transformer block: MLA (multi-head attention in a dense model), then experts (or a dense net in the leading layers), each behind a norm and added to its input. */
import {
  MultiHeadAttention,
  MultiHeadLatentAttention,
  type RotaryEmbedding,
  type SequenceCache,
} from '@moe/attention-mla'
import {
  checkpoint,
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
  usedUp,
  withKept,
  withRecomputed,
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

/**
 * What a layer computes again on the way back, in place of keeping it: `'whole'` all but its input; `'selective'` what takes little time to compute and much memory to keep (V3 report 3.2.3 and
 * 3.3.3): norms, queries, keys and values made from the latents, gated activations, and tokens in the order of their experts.
 */
export type LayerRecompute = 'whole' | 'selective'

export interface DecoderLayerInit extends InitOptions {
  readonly recompute?: LayerRecompute
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
  readonly #recompute: LayerRecompute | undefined

  /** `layer` decides between experts and a dense net. */
  constructor(config: DeepSeekConfig, layer: number, rotary: RotaryEmbedding, options: DecoderLayerInit) {
    super()
    const { balancer, dropping, recompute, ...init } = options
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
    this.#recompute = recompute
    if (recompute !== 'selective') return
    if (this.self_attn instanceof MultiHeadLatentAttention) this.self_attn.recompute = true
    const { mlp } = this
    for (const net of mlp instanceof MoELayer ? [mlp.experts, mlp.shared_experts] : [mlp]) if (net) net.recompute = true
  }

  /** `[B, T, hidden]` to the same shape. */
  forward(x: Tensor, options: LayerOptions): Tensor {
    checkShared('DecoderLayer.forward', options, layerNames)
    return this.whole(x, options, (input, own) => [this.#forward(input, own)])[0]
  }

  #forward(x: Tensor, options: LayerOptions): Tensor {
    const { cache, layer, starts, ...watched } = options
    const { mlp } = this
    const part = isTransient(options) ? scope : <T>(fn: () => T) => fn()
    return part(() => {
      const attended = part(() => this.attend(x, { cache, layer, starts }))
      const more = (normal: Tensor) => (mlp instanceof MoELayer ? mlp.forward(normal, watched) : mlp.forward(normal))
      return plus(attended, this.#behind(this.post_attention_layernorm, attended, more))
    })
  }

  /** The first half of `forward`: attention, added to its input. The other half is `mlp` behind `post_attention_layernorm`, added likewise. */
  attend(x: Tensor, options: LayerOptions): Tensor {
    return plus(
      x,
      this.#behind(this.input_layernorm, x, normal => this.self_attn.forward(normal, options)),
    )
  }

  #behind(norm: RmsNorm, x: Tensor, fn: (normal: Tensor) => Tensor): Tensor {
    const through = this.#recompute === 'selective' ? withRecomputed : withKept
    return through(of => [norm.forward(of)], fn, x)
  }

  /**
   * Runs a part of this layer, which is computed again on the way back where the layer is to be. What the part tells those who watch becomes results of it: they are told outside.
   * @param fn is given options to watch with in place of `options`. Integers among what it returns come last.
   */
  whole(
    input: Tensor,
    options: LayerOptions,
    fn: (input: Tensor, options: LayerOptions) => readonly Tensor[],
  ): readonly Tensor[] {
    if (this.#recompute !== 'whole' || !isRecording()) return fn(input, options)
    let told: Array<(tensor: Tensor) => void> = []
    let own = 0
    const made = checkpoint(x => {
      const losses: Told[] = []
      const loads: Told[] = []
      const noted = (among: Told[], tell?: (tensor: Tensor) => void) =>
        tell && ((tensor: Tensor) => void among.push({ tensor, tell }))
      const results = fn(x, {
        ...options,
        onBalanceLoss: noted(losses, options.onBalanceLoss),
        onBalancerLoss: noted(losses, options.onBalancerLoss),
        onLoad: noted(loads, options.onLoad),
      })
      own = results.length
      // Loads are not told a second time.
      const all = [...losses, ...loads]
      told = all.map(({ tell }) => tell)
      return [...results, ...all.map(({ tensor }) => tensor)]
    }, input)
    for (const [i, tell] of told.entries()) tell(made[own + i])
    return made.slice(0, own)
  }
}

/** x + y, of which no gradient rule reads y. */
function plus(x: Tensor, y: Tensor): Tensor {
  const sum = x.add(y)
  usedUp(y)
  return sum
}

/** What a layer has told, and whom. */
interface Told {
  readonly tensor: Tensor
  readonly tell: (tensor: Tensor) => void
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
