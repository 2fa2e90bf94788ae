/**
 * @file Multi-head attention with grouped keys and values as in Llama (Touvron et al. 2023; Ainslie et al. 2023) and
 * DeepSeek LLM 7B and 67B: the baseline for MLA.
 *
 * Legend: B batch, T time, S cached keys, H heads, G key/value heads, D features of a head.
 */
import {
  attention,
  checkOptions,
  checkShared,
  concat,
  forkInit,
  type InitOptions,
  initNames,
  Linear,
  Module,
  MoeError,
  needAxes,
  noGrad,
  type OptionNames,
  rope,
  scope,
  shown,
  type Tensor,
} from '@moe/core'
import { type CacheOptions, KvCache } from './cache/kv-cache.ts'
import { needSequences, refuseWithCache, type SequenceCache } from './cache/sequence-cache.ts'
import { type RopeScaling, ropeProblems } from './config.ts'
import type { MlaForwardOptions } from './mla.ts'
import { type RotaryEmbedding, sharedRotary } from './rotary.ts'

/** Sizes of a multi-head attention layer, in the terms of Hugging Face's config.json (LlamaConfig). */
export interface MhaConfig {
  /** Features of a token outside of attention. */
  readonly hidden_size: number
  /** Number of query heads. */
  readonly num_attention_heads: number
  /** Number of key/value heads, each shared by equally many query heads. Default: num_attention_heads. */
  readonly num_key_value_heads?: number | undefined
  /** Features of a head. Default: hidden_size / num_attention_heads. */
  readonly head_dim?: number | undefined
  /** Base of the rotation wavelengths. Default 10000. */
  readonly rope_theta?: number | undefined
  /** Context extension. Default null: none. */
  readonly rope_scaling?: RopeScaling | null | undefined
}

const configNames: OptionNames<MhaConfig> = {
  hidden_size: true,
  num_attention_heads: true,
  num_key_value_heads: true,
  head_dim: true,
  rope_theta: true,
  rope_scaling: true,
}

/** Options of a multi-head attention layer: initialization and shared tables. */
export interface MhaOptions extends InitOptions {
  /** Rotation tables of head_dim features, to share between layers. Default: its own tables. */
  readonly rotary?: RotaryEmbedding | undefined
}

/** Options of a forward pass. */
export type MhaForwardOptions = Omit<
  MlaForwardOptions,
  'absorbUpTo' | 'onIndexerLoss' | 'dense' | 'selected' | 'onSelected'
>

const forwardNames: OptionNames<MhaForwardOptions> = { positions: true, starts: true, cache: true, layer: true }

/**
 * Causal multi-head attention with full keys and values. Rotates all features of a head, in halves. Maps `[B, T,
 * hidden]` to the same shape.
 */
export class MultiHeadAttention extends Module {
  /** `[num_attention_heads * head_dim, hidden_size]`. */
  q_proj: Linear
  /** `[num_key_value_heads * head_dim, hidden_size]`. */
  k_proj: Linear
  /** `[num_key_value_heads * head_dim, hidden_size]`. */
  v_proj: Linear
  /** `[hidden_size, num_attention_heads * head_dim]`. */
  o_proj: Linear
  readonly #hidden: number
  readonly #heads: number
  readonly #groups: number
  readonly #features: number
  readonly #rotary: RotaryEmbedding

  /** @throws MoeError E_CONFIG for invalid sizes */
  constructor(config: MhaConfig, options: MhaOptions = {}) {
    super()
    checkShared('MultiHeadAttention', config, configNames)
    checkOptions('MultiHeadAttention', options, { ...initNames, rotary: true })
    const { rotary, ...init } = options
    const { hidden_size: hidden, num_attention_heads: heads, num_key_value_heads: groups = heads } = config
    const { head_dim: features = hidden / heads, rope_theta, rope_scaling } = config
    const problems: string[] = []
    const sizes = { hidden_size: hidden, num_attention_heads: heads, num_key_value_heads: groups, head_dim: features }
    for (const [key, size] of Object.entries(sizes)) {
      // A head_dim computed from invalid sizes is not another problem.
      if (key === 'head_dim' && config.head_dim === undefined) continue
      if (!Number.isInteger(size) || size < 1) problems.push(`${key} = ${shown(size)} is not a positive integer`)
    }
    if (config.head_dim === undefined && hidden % heads !== 0)
      problems.push(`hidden_size = ${hidden} is not a multiple of num_attention_heads = ${heads}; pass head_dim`)
    if (heads % groups !== 0) problems.push(`${heads} heads is not a multiple of ${groups} key/value heads`)
    if (features % 2 === 1) problems.push(`head_dim = ${features} is odd`)
    problems.push(...ropeProblems(config))
    if (rope_scaling?.llama_4_scaling_beta)
      problems.push('rope_scaling.llama_4_scaling_beta is set, but only latent attention scales queries by position')
    if (problems.length > 0) {
      throw new MoeError({ code: 'E_CONFIG', op: 'MultiHeadAttention', problem: problems.join('; ') })
    }
    this.q_proj = new Linear(hidden, heads * features, forkInit(init, 'q_proj'))
    this.k_proj = new Linear(hidden, groups * features, forkInit(init, 'k_proj'))
    this.v_proj = new Linear(hidden, groups * features, forkInit(init, 'v_proj'))
    this.o_proj = new Linear(heads * features, hidden, forkInit(init, 'o_proj'))
    this.#hidden = hidden
    this.#heads = heads
    this.#groups = groups
    this.#features = features
    this.#rotary = sharedRotary(rotary, { qk_rope_head_dim: features, rope_theta, rope_scaling })
  }

  /**
   * Maps x `[batch, time, hidden]` to the same shape. With a cache, gradients are not recorded.
   * @throws MoeError E_SHAPE, E_CONFIG
   */
  forward(x_BTD: Tensor, options: MhaForwardOptions = {}): Tensor {
    needAxes('MultiHeadAttention', x_BTD, ['batch', 'time', this.#hidden])
    checkShared('MultiHeadAttention.forward', options, forwardNames)
    const { cache, positions, starts } = options
    if (cache !== undefined) {
      needSequences('MultiHeadAttention', x_BTD, cache)
      refuseWithCache('MultiHeadAttention', { starts })
      return noGrad(() => scope(() => this.#cached(x_BTD, cache, options)))
    }
    const time = x_BTD.shape[1]
    const { backend } = x_BTD
    const tables = positions ? this.#rotary.at(positions, x_BTD.shape, backend) : this.#rotary.first(time, backend)
    const turn = (x: Tensor) => rope(x, tables.cos, tables.sin, { interleaved: false })
    const q = turn(this.#heads_BTHD(this.q_proj.forward(x_BTD), this.#heads))
    const k = turn(this.#heads_BTHD(this.k_proj.forward(x_BTD), this.#groups))
    return this.#out(attention(q, k, this.#heads_BTHD(this.v_proj.forward(x_BTD), this.#groups), { starts }))
  }

  /** Rows of the cache contain the rotated keys of all G heads, then the values. */
  #cached(x: Tensor, cache: SequenceCache, { layer = 0, positions }: MhaForwardOptions): Tensor {
    const [batch, time] = x.shape
    const width = this.#groups * this.#features
    cache.reserve(time)
    const step = cache.next(time)
    const { cos, sin } = positions ? this.#rotary.at(positions, x.shape, x.backend) : step.tables(this.#rotary)
    const turn = (y: Tensor) => rope(y, cos, sin, { interleaved: false })
    const k = turn(this.#heads_BTHD(this.k_proj.forward(x), this.#groups))
    cache.write(layer, concat([k.reshape([batch, time, width]), this.v_proj.forward(x)], 2))
    const q = turn(this.#heads_BTHD(this.q_proj.forward(x), this.#heads))
    const rows_BSF = cache.first(layer, Math.max(...cache.lengths) + time).cast('f32')
    const half = (at: number) => this.#heads_BTHD(rows_BSF.narrow(2, at * width, (at + 1) * width), this.#groups)
    return this.#out(attention(q, half(0), half(1), { lengths: step.lengths }))
  }

  #heads_BTHD(x: Tensor, heads: number): Tensor {
    return x.reshape([x.shape[0], x.shape[1], heads, this.#features])
  }

  #out(x_BTHD: Tensor): Tensor {
    const [batch, time] = x_BTHD.shape
    return this.o_proj.forward(x_BTHD.reshape([batch, time, this.#heads * this.#features]))
  }

  /** Elements that a cache of this layer stores per token: keys and values of all G heads, 2 G D. */
  get cacheFeatures(): number {
    return 2 * this.#groups * this.#features
  }

  /** Creates a cache for layers like this one. */
  makeCache(options: CacheOptions): KvCache {
    return new KvCache(this.cacheFeatures, options)
  }
}
