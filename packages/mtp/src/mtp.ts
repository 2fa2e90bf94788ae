/**
 * @file Multi-token prediction (V3 report 2.2, eq. 21-25): module k predicts the token k + 1 places ahead from the hidden state of depth k - 1 and
 * the embedding of the token k places ahead, so that the causal chain is kept.
 *
 * Legend: B batch, T time, D hidden size.
 */
import {
  checkOptions,
  checkShared,
  concat,
  denseWeight,
  Embedding,
  forkInit,
  type InitOptions,
  initNames,
  Linear,
  Module,
  MoeError,
  needAxes,
  type OptionNames,
  OutputHead,
  RmsNorm,
  type Tensor,
} from '@moe/core'

/** A transformer block of the main model: `[B, T, D]` to the same shape. */
export interface Block<Options> extends Module {
  /** x `[B, T, D]` to the same shape, causal; `options` are those that the module was run with. */
  forward(x: Tensor, options: Options): Tensor
}

/** Sizes of a module, in the terms of Hugging Face's config.json. */
export interface MtpConfig {
  /** D, features of a token: that of the main model. */
  readonly hidden_size: number
  /** Epsilon of the three norms. Default 1e-6. */
  readonly rms_norm_eps?: number
}

/** What a module shares with the main model, and what it has of its own. */
export interface MtpModuleOptions<Options> extends InitOptions {
  /** The main model's embedding and head, shared: their gradients are the sums over all paths. */
  readonly embedding: Embedding
  /** `[V, D]`. */
  readonly head: Linear
  /**
   * Gives the module an embedding and a head of its own, of the same sizes, under the keys that released layers have for the shared ones
   * (`embed_tokens.weight`, `shared_head.head.weight`). Default false. Programs that read released checkpoints share them regardless.
   */
  readonly separate?: boolean
  /** Makes the module's own transformer block. */
  readonly makeBlock: (init: InitOptions) => Block<Options>
}

const optionNames: OptionNames<MtpModuleOptions<never>> = {
  ...initNames,
  embedding: true,
  head: true,
  separate: true,
  makeBlock: true,
}

/** The norm before the head, and the head if it is the module's own, under their checkpoint names. */
export class SharedHead extends Module {
  /** Norm of this depth's hidden states. */
  norm: RmsNorm
  /** `[V, D]`; only with `separate`. */
  declare head?: Linear

  /** Made by `MtpModule`. @internal */
  constructor(features: number, eps: number | undefined, init: InitOptions) {
    super()
    this.norm = new RmsNorm(features, eps, init)
  }
}

/**
 * One depth of multi-token prediction. Keys are those of the released layer `model.layers.{num_hidden_layers + k - 1}`; eh_proj takes
 * [enorm(embedding); hnorm(hidden)], the order of the released weights (the paper writes the reverse).
 */
export class MtpModule<Options = Record<never, never>> extends Module {
  /** Norm of the embedding. */
  enorm: RmsNorm
  /** Norm of the hidden state of the depth before. */
  hnorm: RmsNorm
  /** M_k `[D, 2 D]` (eq. 21): joins embedding and hidden state. */
  eh_proj: Linear
  /** What turns hidden states of this depth into logits. */
  shared_head: SharedHead
  /** TRM_k (eq. 22), in the released layout without a name of its own. */
  block: Block<Options>
  /** Only with `separate`. */
  declare embed_tokens?: Embedding
  override readonly transparent = ['block']
  readonly #embedding: Embedding
  readonly #head: Linear

  /** @throws MoeError E_ATTR when the embedding, the head or `makeBlock` is missing, E_CONFIG for an unknown option */
  constructor(config: MtpConfig, options: MtpModuleOptions<Options>) {
    super()
    checkShared('MtpModule', config, { hidden_size: true, rms_norm_eps: true })
    checkOptions<MtpModuleOptions<Options>>('MtpModule', options, optionNames)
    const { embedding, head, separate, makeBlock, ...init } = options
    for (const [name, isThere] of Object.entries({
      embedding: embedding?.weight,
      head: head?.forward,
      makeBlock: typeof makeBlock === 'function',
    })) {
      if (isThere) continue
      const fix = 'pass the embedding and the head of the main model, and a function that makes a block'
      throw new MoeError({ code: 'E_ATTR', op: 'MtpModule', problem: `the option ${name} is missing`, fix })
    }
    const { hidden_size: hidden, rms_norm_eps: eps } = config
    this.enorm = new RmsNorm(hidden, eps, init)
    this.hnorm = new RmsNorm(hidden, eps, init)
    this.eh_proj = new Linear(2 * hidden, hidden, forkInit(init, 'eh_proj'))
    this.shared_head = new SharedHead(hidden, eps, init)
    this.block = makeBlock(forkInit(init, 'block'))
    this.#embedding = embedding
    this.#head = head
    if (separate) {
      const [vocabulary] = embedding.weight.shape
      this.embed_tokens = new Embedding(vocabulary, hidden, forkInit(init, 'embed_tokens'))
      this.shared_head.head = new OutputHead(hidden, vocabulary, forkInit(init, 'head'))
    }
  }

  /** Weight `[V, D]` of the module's own head in f32, or null when it is shared. */
  get ownHead(): Tensor | null {
    const { head } = this.shared_head
    return head ? denseWeight(head.weight) : null
  }

  /**
   * Hidden states of this depth before its norm. `hidden_BTD` are what the head saw at the depth before: the main model's after its final norm, a module's
   * after `normalize`. `nextIds i32 [B, T]` are the tokens k places ahead of each position. Positions stay those of the main model. With `detached`
   * the shared embedding gets no gradient.
   */
  forward(hidden_BTD: Tensor, nextIds_BT: Tensor, options: Options, settings: { detached?: boolean } = {}): Tensor {
    return this.block.forward(this.combine(hidden_BTD, nextIds_BT, settings), options)
  }

  /** `forward` up to the block, with the same `detached`: what this is run on, `[B, T, D]`. */
  combine(hidden_BTD: Tensor, nextIds_BT: Tensor, settings: { detached?: boolean } = {}): Tensor {
    needAxes('MtpModule', hidden_BTD, ['batch', 'time', 'hidden'])
    checkOptions('MtpModule', settings, { detached: true })
    const { detached = false } = settings
    const shared = () => {
      const rows = this.#embedding.forward(nextIds_BT)
      return detached ? rows.detach() : rows
    }
    const embedded = this.embed_tokens?.forward(nextIds_BT) ?? shared()
    return this.eh_proj.forward(concat([this.enorm.forward(embedded), this.hnorm.forward(hidden_BTD)], 2))
  }

  /** What the shared head is applied to, and what the next depth continues from. */
  normalize(hidden_BTD: Tensor): Tensor {
    return this.shared_head.norm.forward(hidden_BTD)
  }

  /** Logits `[B, T, V]` of the token k + 1 places ahead, from what `normalize` gave. */
  score(normalized_BTD: Tensor): Tensor {
    return (this.shared_head.head ?? this.#head).forward(normalized_BTD)
  }

  /** Logits `[B, T, V]` of the token k + 1 places ahead, from hidden states of this depth. */
  logits(hidden_BTD: Tensor): Tensor {
    return this.score(this.normalize(hidden_BTD))
  }
}
