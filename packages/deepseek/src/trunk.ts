/** @file Creates the modules of a model: embedding, layers and head. */
import type { RotaryEmbedding } from '@moe/attention-mla'
import { Embedding, forkInit, type InitOptions, type Linear, Module, OutputHead, RmsNorm } from '@moe/core'
import { MtpModule } from '@moe/mtp'
import type { DeepSeekConfig } from './config.ts'
import { DecoderLayer, type DecoderLayerInit, type LayerOptions, type LayerRecompute } from './decoder-layer.ts'
import type { Recompute } from './options.ts'

/** Options of a decoder layer, for all layers. */
export interface TrunkInit extends Omit<DecoderLayerInit, 'recompute'> {
  readonly recompute?: Recompute
}

/** The modules under the key `model`. */
export class Trunk extends Module {
  embed_tokens: Embedding
  /** Decoder layers, then MTP modules, as in the checkpoints. */
  layers: Array<DecoderLayer | MtpModule<LayerOptions>>
  norm: RmsNorm

  constructor(config: DeepSeekConfig, rotary: RotaryEmbedding, options: TrunkInit) {
    super()
    const { balancer, dropping, recompute, ...init } = options
    const { embedding_initializer_range: ownRange = init.std } = config
    const std = init.std === 0 ? 0 : ownRange
    const embedding = { ...forkInit(init, 'embed_tokens'), std }
    this.embed_tokens = new Embedding(config.vocab_size, config.hidden_size, embedding)
    this.layers = Array.from({ length: config.num_hidden_layers }, (_, i) => {
      const own = { ...forkInit(init, `layers.${i}`), balancer, dropping, recompute: ofLayer(recompute, i) }
      return new DecoderLayer(config, i, rotary, own)
    })
    this.norm = new RmsNorm(config.hidden_size, config.rms_norm_eps, init)
  }
}

/** Creates the layers and the head. MTP modules follow the decoder layers and share embedding and head. */
export function makeTrunk(
  config: DeepSeekConfig,
  rotary: RotaryEmbedding,
  { balancer, dropping, recompute, ...init }: TrunkInit,
): { readonly model: Trunk; readonly head: Linear } {
  const model = new Trunk(config, rotary, { ...init, balancer, dropping, recompute })
  const { layers, embed_tokens: embedding } = model
  const head = new OutputHead(config.hidden_size, config.vocab_size, forkInit(init, 'lm_head'))
  if (config.tie_word_embeddings) {
    head.weight.dispose()
    head.weight = embedding.weight
  }
  for (let depth = 0; depth < config.num_nextn_predict_layers; depth++) {
    const index = config.num_hidden_layers + depth
    const parts = { balancer, dropping, recompute: ofLayer(recompute, index) }
    const makeBlock = (own: InitOptions) => new DecoderLayer(config, index, rotary, { ...own, ...parts })
    const own = forkInit(init, `layers.${index}`)
    const separate = config.mtp_separate_embeddings
    layers.push(new MtpModule<LayerOptions>(config, { ...own, embedding, head, makeBlock, separate }))
  }
  return { model, head }
}

/** Returns what a layer recomputes. MTP modules follow the decoder layers. */
function ofLayer(recompute: Recompute | undefined, index: number): LayerRecompute | undefined {
  if (recompute === undefined || recompute === 'selective') return recompute
  const every = recompute === 'layers' ? 1 : recompute.every
  return (index + 1) % every === 0 ? 'whole' : undefined
}
