/**
 * @file The lightning indexer of DeepSeek Sparse Attention, which scores all keys of a query cheaply (DeepSeek-V3.2
 * report 2.1; `Indexer` in inference/model.py of the released weights).
 *
 * Legend: B batch, T time, S keys, J heads of the indexer, I features of its queries and keys, K selected keys.
 */
import { forkInit, type InitOptions, indexScores, Linear, Module, rope, type Tensor } from '@moe/core'
import type { MlaConfig } from './config.ts'
import { LayerNorm } from './layer-norm.ts'
import type { RotaryTables } from './rotary.ts'

/** What the indexer computes from the tokens that look for keys. */
export interface IndexQueries {
  /** Queries `[B, T, J, I]`. */
  readonly q: Tensor
  /** Weights of the heads `[B, T, J]`, including the scale of the scores. */
  readonly weights: Tensor
}

/** A projection to few numbers, which quantization leaves as it is. */
class UnquantizedLinear extends Linear {
  override readonly quantizable = []
}

/**
 * Scores every key for every query by a few small heads (eq. 1). Its Hadamard rotation and fp8 products, which the
 * released code has for speed, do not change the scores except by rounding; here they are omitted.
 */
export class LightningIndexer extends Module {
  /** Query projection `[index_n_heads * index_head_dim, q_lora_rank]`, from the compressed query. */
  wq_b: Linear
  /** Key projection `[index_head_dim, hidden_size]`; all heads share the key. */
  wk: Linear
  /** Norm of the keys, with bias. */
  k_norm: LayerNorm
  /** Projection to the weight of each head, `[index_n_heads, hidden_size]`. Never quantized, as in the released models. */
  weights_proj: Linear
  readonly #heads: number
  readonly #features: number
  readonly #rotated: number
  readonly #interleaved: boolean

  /** The configuration must have been checked. @internal */
  constructor(config: MlaConfig, init: InitOptions) {
    super()
    const { hidden_size: hidden } = config
    const heads = config.index_n_heads as number
    const features = config.index_head_dim as number
    const child = (name: string) => forkInit(init, name)
    this.wq_b = new Linear(config.q_lora_rank as number, heads * features, child('wq_b'))
    this.wk = new Linear(hidden, features, child('wk'))
    this.k_norm = new LayerNorm(features, init.backend)
    this.weights_proj = new UnquantizedLinear(hidden, heads, { ...child('weights_proj'), weights: undefined })
    this.#heads = heads
    this.#features = features
    this.#rotated = config.qk_rope_head_dim
    this.#interleaved = config.indexer_rope_interleave ?? false
  }

  /** Returns the keys `[B, T, I]` of tokens x `[B, T, hidden]`. */
  keys(x_BTD: Tensor, tables: RotaryTables): Tensor {
    const [batch, time] = x_BTD.shape
    const k = this.k_norm.forward(this.wk.forward(x_BTD)).reshape([batch, time, 1, this.#features])
    return this.#rotate(k, tables).reshape([batch, time, this.#features])
  }

  /** Returns the queries of tokens x `[B, T, hidden]` with compressed queries `[B, T, q_lora_rank]`. */
  queries(x_BTD: Tensor, compressed: Tensor, tables: RotaryTables): IndexQueries {
    const [batch, time] = x_BTD.shape
    const q = this.wq_b.forward(compressed).reshape([batch, time, this.#heads, this.#features])
    const weights = this.weights_proj.forward(x_BTD).mul((this.#heads * this.#features) ** -0.5)
    return { q: this.#rotate(q, tables), weights }
  }

  /**
   * Rotates the first features of each head and moves them behind the others, in queries and keys alike, which does not
   * change their products.
   */
  #rotate(x: Tensor, { cos, sin }: RotaryTables): Tensor {
    const features = this.#features
    const rotated = this.#rotated
    const plain = rotated === features ? undefined : x.narrow(3, rotated, features)
    return rope(x.narrow(3, 0, rotated), cos, sin, { interleaved: this.#interleaved, plain })
  }
}

/**
 * Returns the positions of the K keys `[B, S, I]` with the best index scores (eq. 1) for each query, `i32 [B, T, K]`.
 * Keys at or past `limits` (`i32 [B, T]`) come last, so the first min(K, limit) positions are the selection.
 */
export function bestKeys({ q, weights }: IndexQueries, keys_BSI: Tensor, limits: Tensor, count: number): Tensor {
  return indexScores(q, weights, keys_BSI, { limits }).topk(count).indices
}
