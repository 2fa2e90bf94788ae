/**
 * @file Multi-head Latent Attention (DeepSeek-V2 report 2.1, V3 report eq. 1-11).
 *
 * Legend: B batch, T time, H heads, N nope features, R rope features, V value features, C kv_lora_rank.
 */
import {
  attention,
  concat,
  forkInit,
  type Handle,
  type InitOptions,
  keep,
  Linear,
  latentAttention,
  Module,
  noGrad,
  RmsNorm,
  rope,
  scope,
  type Tensor,
} from '@moe/core'
import type { KvCache } from './cache.ts'
import { checkMlaConfig, type MlaConfig } from './config.ts'
import { RotaryEmbedding, type RotaryTables, softmaxScale } from './rotary.ts'

export interface MlaOptions extends InitOptions {
  /** Rotation tables to share between layers; default own ones. */
  readonly rotary?: RotaryEmbedding
  /** Epsilon of the norms on the latents; the released models use 1e-6 whatever rms_norm_eps is. */
  readonly latentNormEps?: number
}

export interface MlaForwardOptions {
  /** Positions of the tokens, row-major `[B, T]`. Default 0 .. T-1, or what follows the cache. */
  readonly positions?: Int32Array
  /** Earlier tokens; the new ones are written to it (the caller advances it once for all layers). Inference only. */
  readonly cache?: KvCache
  /** Which layer of the cache is this one's. Default 0. */
  readonly layer?: number
  /** Longest run of new tokens that is computed in absorbed form; longer ones expand keys and values. Default 8. */
  readonly absorbUpTo?: number
}

/** W_UK `[H, N, C]` and W_UV `[H, V, C]` cut out of kv_b_proj for absorbed decoding, while that stays the same. */
interface Absorbed {
  readonly of: Handle
  readonly keyUp_HNC: Tensor
  readonly valueUp_HVC: Tensor
}

/** Attention whose keys and values are expanded from one low-rank latent per token. `[B, T, hidden]` to the same shape, causal. */
export class MultiHeadLatentAttention extends Module {
  /** Without query compression (q_lora_rank null). */
  declare q_proj?: Linear
  declare q_a_proj?: Linear
  declare q_a_layernorm?: RmsNorm
  declare q_b_proj?: Linear
  kv_a_proj_with_mqa: Linear
  kv_a_layernorm: RmsNorm
  kv_b_proj: Linear
  o_proj: Linear
  readonly #config: MlaConfig
  readonly #scale: number
  readonly #rotary: RotaryEmbedding
  #absorbed: Absorbed | null = null

  /** @throws MoeError E_CONFIG when sizes are impossible. */
  constructor(config: MlaConfig, options: MlaOptions = {}) {
    super()
    checkMlaConfig(config)
    const { hidden_size: hidden, num_attention_heads: heads, kv_lora_rank: latent, qk_rope_head_dim: ropeDim } = config
    const { latentNormEps = 1e-6, rotary = new RotaryEmbedding(config) } = options
    const queries = heads * (config.qk_nope_head_dim + ropeDim)
    const child = (name: string) => forkInit(options, name)
    if (config.q_lora_rank === null) this.q_proj = new Linear(hidden, queries, child('q_proj'))
    else {
      this.q_a_proj = new Linear(hidden, config.q_lora_rank, child('q_a_proj'))
      this.q_a_layernorm = new RmsNorm(config.q_lora_rank, latentNormEps, options)
      this.q_b_proj = new Linear(config.q_lora_rank, queries, child('q_b_proj'))
    }
    this.kv_a_proj_with_mqa = new Linear(hidden, latent + ropeDim, child('kv_a_proj_with_mqa'))
    this.kv_a_layernorm = new RmsNorm(latent, latentNormEps, options)
    this.kv_b_proj = new Linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), child('kv_b_proj'))
    this.o_proj = new Linear(heads * config.v_head_dim, hidden, child('o_proj'))
    this.#config = config
    this.#scale = softmaxScale(config)
    this.#rotary = rotary
  }

  forward(x_BTD: Tensor, options: MlaForwardOptions = {}): Tensor {
    const { cache, positions } = options
    const [batch, time] = x_BTD.shape
    const { backend } = x_BTD
    if (cache === undefined) {
      const tables = positions ? this.#rotary.at(positions, batch, backend) : this.#rotary.first(time, backend)
      const { latent_BTC, ropeKey_BT1R } = this.#compress(x_BTD, tables)
      return this.#expanded(this.#queries(x_BTD, tables), latent_BTC, ropeKey_BT1R)
    }
    return noGrad(() =>
      scope(() => {
        const tables = this.#rotary.at(positions ?? cache.positions(time), batch, backend)
        return this.#cached(x_BTD, cache, tables, options)
      }),
    )
  }

  /** Queries `[B, T, H, N + R]`, rope part turned. */
  #queries(x: Tensor, { cos, sin }: RotaryTables): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, qk_rope_head_dim: ropeDim } = this.#config
    const flat = this.q_proj
      ? this.q_proj.forward(x)
      : (this.q_b_proj as Linear).forward((this.q_a_layernorm as RmsNorm).forward((this.q_a_proj as Linear).forward(x)))
    return this.#turn(flat.reshape([x.shape[0], x.shape[1], heads, nope + ropeDim]), cos, sin)
  }

  #turn(x: Tensor, cos: Tensor, sin: Tensor): Tensor {
    return rope(x, cos, sin, { interleaved: this.#config.rope_interleave ?? true })
  }

  /** What the cache holds: the normalized latent, and the rope key (one head for all, not normalized), turned. */
  #compress(x: Tensor, { cos, sin }: RotaryTables): { latent_BTC: Tensor; ropeKey_BT1R: Tensor } {
    const { kv_lora_rank: rank, qk_rope_head_dim: ropeDim } = this.#config
    const [batch, time] = x.shape
    const both = this.kv_a_proj_with_mqa.forward(x)
    const latent_BTC = this.kv_a_layernorm.forward(both.narrow(2, 0, rank))
    const key = both.narrow(2, rank, rank + ropeDim).reshape([batch, time, 1, ropeDim])
    return { latent_BTC, ropeKey_BT1R: this.#turn(key, cos, sin) }
  }

  /** Multi-head form: every head's keys and values are expanded from the latents (training, and prefill). */
  #expanded(q_BTHD: Tensor, latent_BSC: Tensor, ropeKey_BS1R: Tensor, lengths?: Tensor): Tensor {
    const {
      num_attention_heads: heads,
      qk_nope_head_dim: nope,
      qk_rope_head_dim: ropeDim,
      v_head_dim: value,
    } = this.#config
    const [batch, keys] = latent_BSC.shape
    const kv = this.kv_b_proj.forward(latent_BSC).reshape([batch, keys, heads, nope + value])
    const k = concat([kv.narrow(3, 0, nope), ropeKey_BS1R.expand([batch, keys, heads, ropeDim])], 3)
    const v = kv.narrow(3, nope, nope + value)
    const out = attention(q_BTHD, k, v, { scale: this.#scale, lengths })
    return this.o_proj.forward(out.reshape([batch, q_BTHD.shape[1], heads * value]))
  }

  #cached(x: Tensor, cache: KvCache, tables: RotaryTables, options: MlaForwardOptions): Tensor {
    const { layer = 0, absorbUpTo = 8 } = options
    const { kv_lora_rank: rank, qk_rope_head_dim: ropeDim } = this.#config
    const [batch, time] = x.shape
    const { latent_BTC, ropeKey_BT1R } = this.#compress(x, tables)
    cache.write(layer, concat([latent_BTC, ropeKey_BT1R.reshape([batch, time, ropeDim])], 2))
    const q = this.#queries(x, tables)
    const lengths = cache.lengthsAfter(time, x.backend)
    if (time <= absorbUpTo) return this.#absorbedForward(q, cache.rows(layer), lengths)
    const used = Math.max(...cache.lengths) + time
    const rows = cache.rows(layer).narrow(1, 0, used).cast('f32')
    const ropeKeys = rows.narrow(2, rank, rank + ropeDim).reshape([batch, used, 1, ropeDim])
    return this.#expanded(q, rows.narrow(2, 0, rank), ropeKeys, lengths)
  }

  /** Multi-query form in latent space: score = (W_UK^T q_nope) . c + q_rope . k_rope, out = W_UV (sum p c). */
  #absorbedForward(q_BTHD: Tensor, rows_BSC: Tensor, lengths: Tensor): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, kv_lora_rank: rank, v_head_dim: value } = this.#config
    const [batch, time, , features] = q_BTHD.shape
    const { keyUp_HNC, valueUp_HVC } = this.#absorb()
    const byHead = (t: Tensor) => t.permute([2, 0, 1, 3]).reshape([heads, batch * time, t.shape[3]])
    const perToken = (t: Tensor) => t.reshape([heads, batch, time, t.shape[2]]).permute([1, 2, 0, 3])
    const qLatent = perToken(byHead(q_BTHD.narrow(3, 0, nope)).matmul(keyUp_HNC))
    const q = concat([qLatent, q_BTHD.narrow(3, nope, features)], 3)
    const context_BTHC = latentAttention(q, rows_BSC, lengths, { scale: this.#scale, valueDim: rank })
    const out = perToken(byHead(context_BTHC).matmul(valueUp_HVC, { transposeB: true }))
    return this.o_proj.forward(out.reshape([batch, time, heads * value]))
  }

  #absorb(): Absorbed {
    const { weight } = this.kv_b_proj
    const before = this.#absorbed
    if (before !== null && before.of === weight.handle) return before
    const { num_attention_heads: heads, qk_nope_head_dim: nope, kv_lora_rank: rank, v_head_dim: value } = this.#config
    this.releaseAbsorbed()
    const absorbed = keep({
      of: weight.handle,
      ...scope(() => {
        const perHead = weight.detach().reshape([heads, nope + value, rank])
        return { keyUp_HNC: perHead.narrow(1, 0, nope), valueUp_HVC: perHead.narrow(1, nope, nope + value) }
      }),
    })
    this.#absorbed = absorbed
    return absorbed
  }

  /** Frees the copies of kv_b_proj that absorbed decoding made. They come back when needed. */
  releaseAbsorbed(): void {
    this.#absorbed?.keyUp_HNC.dispose()
    this.#absorbed?.valueUp_HVC.dispose()
    this.#absorbed = null
  }
}
