/**
 * @file Multi-token prediction (V3 report 2.2, eq. 21-25). Module k predicts the token k + 1 places ahead from the
 * hidden state of depth k - 1 and the embedding of the token k places ahead, which keeps the complete causal chain.
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

/** A transformer block like those of the main model: maps `[B, T, D]` to the same shape. */
export interface Block<Options> extends Module {
  /** Maps x `[B, T, D]` to the same shape, causally. `options` are passed through from the module. */
  forward(x: Tensor, options: Options): Tensor
}

/** Sizes of a module, in the terms of Hugging Face's config.json. */
export interface MtpConfig {
  /** D, the features of a token in the main model. */
  readonly hidden_size: number
  /** Epsilon of the three norms. Default 1e-6. */
  readonly rms_norm_eps?: number | undefined
}

/** Options of a module: what it shares with the main model, and its block. */
export interface MtpModuleOptions<Options> extends InitOptions {
  /** The main model's embedding. If it is shared, its gradients are summed over all uses. */
  readonly embedding: Embedding
  /** The main model's output head, `[V, D]`, shared like the embedding. */
  readonly head: Linear
  /**
   * Gives the module its own embedding and head of the same sizes, under the keys that released layers use for the
   * shared ones (`embed_tokens.weight`, `shared_head.head.weight`). Default false. Programs that read released
   * checkpoints share them regardless.
   */
  readonly separate?: boolean | undefined
  /** Creates the module's own transformer block. */
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

  /** Created by `MtpModule`. @internal */
  constructor(features: number, eps: number | undefined, init: InitOptions) {
    super()
    this.norm = new RmsNorm(features, eps, init)
  }
}

/**
 * One depth of multi-token prediction. Keys are those of the released layer `model.layers.{num_hidden_layers + k - 1}`.
 * eh_proj takes [enorm(embedding); hnorm(hidden)], the order of the released weights (the paper has the reverse order).
 */
export class MtpModule<Options = Record<never, never>> extends Module {
  /** Norm of the embedding. */
  enorm: RmsNorm
  /** Norm of the hidden state of the previous depth. */
  hnorm: RmsNorm
  /** M_k `[D, 2 D]` (eq. 21), which combines embedding and hidden state. */
  eh_proj: Linear
  /** Norm (and own head, if any) that turns hidden states of this depth into logits. */
  shared_head: SharedHead
  /** TRM_k (eq. 22). Its name is not part of the keys, as in the released layout. */
  block: Block<Options>
  /** The module's own embedding; only with `separate`. */
  declare embed_tokens?: Embedding
  override readonly transparent = ['block']
  readonly #embedding: Embedding
  readonly #head: Linear

  /** @throws MoeError E_ATTR if the embedding, the head or `makeBlock` is missing, E_CONFIG for an unknown option */
  constructor(config: MtpConfig, options: MtpModuleOptions<Options>) {
    super()
    checkShared('MtpModule', config, { hidden_size: true, rms_norm_eps: true })
    checkOptions<MtpModuleOptions<Options>>('MtpModule', options, optionNames)
    const { embedding, head, separate, makeBlock, ...init } = options
    for (const [name, present] of Object.entries({
      embedding: embedding?.weight,
      head: head?.forward,
      makeBlock: typeof makeBlock === 'function',
    })) {
      if (present) continue
      const fix = 'pass the embedding and the head of the main model, and a function that creates a block'
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

  /** Weight `[V, D]` of the module's own head in f32, or null if the head is shared. */
  get ownHead(): Tensor | null {
    const { head } = this.shared_head
    return head ? denseWeight(head.weight) : null
  }

  /**
   * Returns the hidden states of this depth before its norm. `hidden_BTD` is the input of the head at the previous
   * depth: the main model's hidden states after its final norm, or the result of a module's `normalize`. `nextIds i32
   * [B, T]` are the tokens k places ahead of each position. Positions are those of the main model. With `detached`, the
   * shared embedding gets no gradient.
   */
  forward(hidden_BTD: Tensor, nextIds_BT: Tensor, options: Options, settings: { detached?: boolean } = {}): Tensor {
    return this.block.forward(this.combine(hidden_BTD, nextIds_BT, settings), options)
  }

  /** Runs `forward` up to the block and returns the block's input, `[B, T, D]`. `detached` as in `forward`. */
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

  /** Applies this depth's norm. The result is the input of the head and of the next depth. */
  normalize(hidden_BTD: Tensor): Tensor {
    return this.shared_head.norm.forward(hidden_BTD)
  }

  /** Returns logits `[B, T, V]` of the token k + 1 places ahead, from the result of `normalize`. */
  score(normalized_BTD: Tensor): Tensor {
    return (this.shared_head.head ?? this.#head).forward(normalized_BTD)
  }

  /** Returns logits `[B, T, V]` of the token k + 1 places ahead, from hidden states of this depth. */
  logits(hidden_BTD: Tensor): Tensor {
    return this.score(this.normalize(hidden_BTD))
  }
}
