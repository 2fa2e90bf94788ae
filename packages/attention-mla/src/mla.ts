/**
 * @file Multi-head Latent Attention (DeepSeek-V2 report 2.1, V3 report eq. 1-11).
 *
 * Legend: B batch, T time, H heads, N nope features, R rope features, V value features, C kv_lora_rank.
 */
import {
  type AttentionOptions,
  attention,
  type Backend,
  checkOptions,
  checkShared,
  denseWeight,
  forkInit,
  fromHost,
  type InitOptions,
  initNames,
  keep,
  Linear,
  latentAttention,
  Module,
  mlaKeyValue,
  needAxes,
  noGrad,
  type OptionNames,
  QuantizedParameter,
  type QuantizedWeight,
  quantizedGroupedMatmul,
  quantizeWeight,
  RmsNorm,
  rope,
  scope,
  type Tensor,
  usedUp,
  weightVersion,
  withKept,
  withRecomputed,
} from '@moe/core'
import { latentFeatures } from './cache/kv-cache.ts'
import { type CacheStep, needSequences, type SequenceCache } from './cache/sequence-cache.ts'
import { checkMlaConfig, type MlaConfig } from './config.ts'
import { type RotaryEmbedding, type RotaryTables, sharedRotary, softmaxScale } from './rotary.ts'

/** How an MLA layer starts, and what it shares with others. */
export interface MlaOptions extends InitOptions {
  /** Rotation tables to share between layers; default own ones. */
  readonly rotary?: RotaryEmbedding
  /** Epsilon of the norms on the latents; the released models use 1e-6 whatever rms_norm_eps is. */
  readonly latentNormEps?: number
}

const optionNames: OptionNames<MlaOptions> = { ...initNames, rotary: true, latentNormEps: true }

/** Positions and cache of a pass. */
export interface MlaForwardOptions {
  /** Positions of the tokens, row-major `[B, T]`. Default 0 .. T-1, or what follows the cache. */
  readonly positions?: Int32Array
  /** `i32 [B, T]`: first place of its row that each token sees, where several texts share a row (`attention`). Not with a cache. Default 0. */
  readonly starts?: Tensor
  /** Earlier tokens; the new ones are written to it (the caller advances it once for all layers). Inference only. */
  readonly cache?: SequenceCache
  /** Which layer of the cache is this one's. Default 0. */
  readonly layer?: number
  /** Longest run of new tokens that is computed in absorbed form; longer ones expand keys and values. Default 8. */
  readonly absorbUpTo?: number
}

const forwardNames: OptionNames<MlaForwardOptions> = {
  positions: true,
  starts: true,
  cache: true,
  layer: true,
  absorbUpTo: true,
}

/**
 * W_UK and W_UV cut out of kv_b_proj for absorbed decoding, while that stays the same: `[H, N, C]` and `[H, V, C]`, or where that is stored in fewer
 * bits `[H, C, N]` and `[H, V, C]` in bf16 (quantizing W_UK anew along another axis would add a second error).
 */
type Absorbed = { readonly of: Tensor; readonly version: number } & (
  | { readonly keyUp_HNC: Tensor; readonly valueUp_HVC: Tensor }
  | { readonly keyUp_HCN: QuantizedWeight; readonly valueUp_HVC: QuantizedWeight }
)

/** Attention whose keys and values are expanded from one low-rank latent per token. `[B, T, hidden]` to the same shape, causal. */
export class MultiHeadLatentAttention extends Module {
  /** Without query compression (q_lora_rank null). */
  declare q_proj?: Linear
  /** W_DQ `[q_lora_rank, hidden_size]` (eq. 6). Not there where q_lora_rank is null, like the two below. */
  declare q_a_proj?: Linear
  /** Norm of the compressed query. */
  declare q_a_layernorm?: RmsNorm
  /** W_UQ and W_QR `[heads * (nope + rope), q_lora_rank]` (eq. 7 and 8): in each head nope features, then rope. */
  declare q_b_proj?: Linear
  /** W_DKV and W_KR `[kv_lora_rank + rope, hidden_size]` (eq. 1 and 3). */
  kv_a_proj_with_mqa: Linear
  /** Norm of the latent. */
  kv_a_layernorm: RmsNorm
  /** W_UK and W_UV `[heads * (nope + v), kv_lora_rank]` (eq. 2 and 5): in each head nope features of the key, then the value. */
  kv_b_proj: Linear
  /** W_O `[hidden_size, heads * v]` (eq. 11). */
  o_proj: Linear
  /**
   * Make queries, keys and values again from the latents on the way back, in place of keeping them (V3 report 3.2.3); the attention itself is not repeated. May be changed between
   * passes. Default false.
   */
  recompute = false
  readonly #config: MlaConfig
  readonly #scale: number
  readonly #rotary: RotaryEmbedding
  #absorbed: Absorbed | null = null

  /** @throws MoeError E_CONFIG when sizes are impossible. */
  constructor(config: MlaConfig, options: MlaOptions = {}) {
    super()
    checkMlaConfig(config)
    checkOptions('MultiHeadLatentAttention', options, optionNames)
    const { hidden_size: hidden, num_attention_heads: heads, kv_lora_rank: latent, qk_rope_head_dim: ropeDim } = config
    const { latentNormEps = 1e-6, rotary, ...init } = options
    const queries = heads * (config.qk_nope_head_dim + ropeDim)
    const child = (name: string) => forkInit(init, name)
    if (config.q_lora_rank === null) this.q_proj = new Linear(hidden, queries, child('q_proj'))
    else {
      this.q_a_proj = new Linear(hidden, config.q_lora_rank, child('q_a_proj'))
      this.q_a_layernorm = new RmsNorm(config.q_lora_rank, latentNormEps, init)
      this.q_b_proj = new Linear(config.q_lora_rank, queries, child('q_b_proj'))
    }
    this.kv_a_proj_with_mqa = new Linear(hidden, latent + ropeDim, child('kv_a_proj_with_mqa'))
    this.kv_a_layernorm = new RmsNorm(latent, latentNormEps, init)
    this.kv_b_proj = new Linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), child('kv_b_proj'))
    this.o_proj = new Linear(heads * config.v_head_dim, hidden, child('o_proj'))
    this.#config = config
    this.#scale = softmaxScale(config)
    this.#rotary = sharedRotary(rotary, config)
  }

  /** Elements per token that a cache of this layer holds: the latent, and the key that is turned. */
  get cacheFeatures(): number {
    return latentFeatures('MultiHeadLatentAttention', this.#config)
  }

  /**
   * x `[batch, time, hidden]` to the same shape. With a cache it records no gradients, and runs of up to `absorbUpTo` tokens attend to the latents
   * themselves. @throws MoeError E_SHAPE, E_CONFIG
   */
  forward(x_BTD: Tensor, options: MlaForwardOptions = {}): Tensor {
    needAxes('MultiHeadLatentAttention', x_BTD, ['batch', 'time', 'hidden'])
    checkShared('MultiHeadLatentAttention.forward', options, forwardNames)
    const { cache, positions, starts } = options
    const time = x_BTD.shape[1]
    const { backend } = x_BTD
    if (cache === undefined) {
      const tables = positions ? this.#rotary.at(positions, x_BTD.shape, backend) : this.#rotary.first(time, backend)
      const { down, both } = this.#project(x_BTD)
      const through = this.recompute ? withRecomputed : withKept
      return through(
        (forQueries, forKeys) => {
          const flat = this.#queries(forQueries)
          const q = this.#turn(flat, tables)
          // No gradient rule reads it, nor `kv` below.
          usedUp(flat)
          return [q, ...this.#keyValue(this.#latent(forKeys), this.#turn(this.#ropeKey(forKeys), tables))]
        },
        (q, k, v) => this.#attend(q, k, v, { starts }),
        down,
        both,
      )
    }
    needSequences('MultiHeadLatentAttention', x_BTD, cache)
    return noGrad(() =>
      scope(() => {
        cache.reserve(time)
        const tables = positions
          ? this.#rotary.at(positions, x_BTD.shape, backend)
          : cache.next(time).tables(this.#rotary)
        return this.#cached(x_BTD, cache, tables, options)
      }),
    )
  }

  /** The two products with `x`, right after each other, as a backend may make one of them: what queries and latents are made of. */
  #project(x: Tensor): { down: Tensor; both: Tensor } {
    return { down: (this.q_proj ?? (this.q_a_proj as Linear)).forward(x), both: this.kv_a_proj_with_mqa.forward(x) }
  }

  /** Queries `[B, T, H, N + R]`, rope part not turned. */
  #queries(down: Tensor): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, qk_rope_head_dim: ropeDim } = this.#config
    const flat = this.q_proj ? down : (this.q_b_proj as Linear).forward((this.q_a_layernorm as RmsNorm).forward(down))
    return flat.reshape([down.shape[0], down.shape[1], heads, nope + ropeDim])
  }

  /** The last R features of each head turned, behind its others or behind those of `plain`. */
  #turn(x: Tensor, { cos, sin }: RotaryTables, plain?: Tensor): Tensor {
    return rope(x, cos, sin, { interleaved: this.#config.rope_interleave ?? true, plain })
  }

  /** The normalized latents `[B, T, C]` in what `kv_a_proj_with_mqa` gives. */
  #latent(both: Tensor): Tensor {
    return this.kv_a_layernorm.forward(both.narrow(2, 0, this.#config.kv_lora_rank))
  }

  /** The rope keys behind latents, one head for all: of `[B, T, C + R]` the last as `[B, T, 1, R]`. */
  #ropeKey(both: Tensor): Tensor {
    const [batch, time, features] = both.shape
    const ropeDim = this.#config.qk_rope_head_dim
    return both.narrow(2, features - ropeDim, features).reshape([batch, time, 1, ropeDim])
  }

  /** Multi-head form: every head's keys `[B, S, H, N + R]` and values `[B, S, H, V]` are expanded from the latents (training, and prefill). */
  #keyValue(latent_BSC: Tensor, ropeKey_BS1R: Tensor): readonly [k: Tensor, v: Tensor] {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, v_head_dim: value } = this.#config
    const [batch, keys] = latent_BSC.shape
    const kv = this.kv_b_proj.forward(latent_BSC).reshape([batch, keys, heads, nope + value])
    const { k, v } = mlaKeyValue(kv, ropeKey_BS1R, nope)
    if (v !== kv) usedUp(kv)
    return [k, v]
  }

  #attend(q_BTHD: Tensor, k: Tensor, v: Tensor, seen: Pick<AttentionOptions, 'lengths' | 'starts'>): Tensor {
    const [batch, time] = q_BTHD.shape
    const out = attention(q_BTHD, k, v, { scale: this.#scale, ...seen })
    return this.o_proj.forward(out.reshape([batch, time, v.shape[2] * v.shape[3]]))
  }

  #cached(x: Tensor, cache: SequenceCache, tables: RotaryTables, options: MlaForwardOptions): Tensor {
    const { layer = 0, absorbUpTo = 8 } = options
    const [batch, time] = x.shape
    const { down, both } = this.#project(x)
    const oneHead = (t: Tensor) => t.reshape([batch, time, 1, t.shape[2]])
    const row = this.#turn(oneHead(both), tables, oneHead(this.#latent(both)))
    cache.write(layer, row.reshape(both.shape))
    const q = this.#queries(down)
    const step = cache.next(time)
    if (time <= absorbUpTo) return this.#absorbedForward(q, tables, cache.rows(layer), step)
    const rows = cache.first(layer, Math.max(...cache.lengths) + time).cast('f32')
    const latents = rows.narrow(2, 0, this.#config.kv_lora_rank)
    const [k, v] = this.#keyValue(latents, this.#ropeKey(rows))
    return this.#attend(this.#turn(q, tables), k, v, { lengths: step.lengths })
  }

  /** Multi-query form in latent space: score = (W_UK^T q_nope) . c + q_rope . k_rope, out = W_UV (sum p c). */
  #absorbedForward(q_BTHD: Tensor, tables: RotaryTables, rows: Tensor, step: CacheStep): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, kv_lora_rank: rank, v_head_dim: value } = this.#config
    const [batch, time] = q_BTHD.shape
    const { lengths, pages } = step
    const { up, down } = this.#perHead(batch * time, q_BTHD.backend)
    // With one token the heads already lie in front.
    const one = batch * time === 1
    const byHead = (t: Tensor) => (one ? t : t.permute([2, 0, 1, 3])).reshape([heads, batch * time, t.shape[3]])
    const perToken = (t: Tensor) =>
      one ? t.reshape([1, 1, heads, t.shape[2]]) : t.reshape([heads, batch, time, t.shape[2]]).permute([1, 2, 0, 3])
    const qLatent = perToken(up(byHead(q_BTHD.narrow(3, 0, nope))))
    const q = this.#turn(q_BTHD, tables, qLatent)
    const context_BTHC = latentAttention(q, rows, lengths, { scale: this.#scale, valueDim: rank, pages })
    const out = perToken(down(byHead(context_BTHC)))
    return this.o_proj.forward(out.reshape([batch, time, heads * value]))
  }

  /** The products with W_UK and W_UV of every head: `[H, M, N]` to `[H, M, C]`, and `[H, M, C]` to `[H, M, V]`. */
  #perHead(rows: number, backend: Backend) {
    const absorbed = this.#absorb()
    if ('keyUp_HNC' in absorbed) {
      const { keyUp_HNC, valueUp_HVC } = absorbed
      return {
        up: (x: Tensor) => x.matmul(keyUp_HNC),
        down: (x: Tensor) => x.matmul(valueUp_HVC, { transposeB: true }),
      }
    }
    const { num_attention_heads: heads } = this.#config
    const offsets = fromHost(
      Int32Array.from({ length: heads + 1 }, (_, head) => head * rows),
      [heads + 1],
      'i32',
      backend,
    )
    const product = (weight: QuantizedWeight) => (x: Tensor) =>
      quantizedGroupedMatmul(x.reshape([heads * rows, x.shape[2]]), weight, offsets).reshape([
        heads,
        rows,
        weight.shape[1],
      ])
    return { up: product(absorbed.keyUp_HCN), down: product(absorbed.valueUp_HVC) }
  }

  #absorb(): Absorbed {
    const { weight } = this.kv_b_proj
    const before = this.#absorbed
    if (before !== null && before.of === weight && before.version === weightVersion(weight)) return before
    const { num_attention_heads: heads, qk_nope_head_dim: nope, kv_lora_rank: rank, v_head_dim: value } = this.#config
    this.releaseAbsorbed()
    const stored = weight instanceof QuantizedParameter && weight.backend.dtypes.has('bf16')
    const absorbed = {
      of: weight,
      version: weightVersion(weight),
      ...keep(
        scope(() => {
          const perHead = denseWeight(weight)
            .detach()
            .reshape([heads, nope + value, rank])
          const keyUp_HNC = perHead.narrow(1, 0, nope)
          const valueUp_HVC = perHead.narrow(1, nope, nope + value)
          if (!stored) return { keyUp_HNC, valueUp_HVC }
          return {
            keyUp_HCN: quantizeWeight(keyUp_HNC.permute([0, 2, 1]), 'bf16'),
            valueUp_HVC: quantizeWeight(valueUp_HVC, 'bf16'),
          }
        }),
      ),
    }
    this.#absorbed = absorbed
    return absorbed
  }

  /** Frees the copies of kv_b_proj that absorbed decoding made. They come back when needed. */
  releaseAbsorbed(): void {
    const absorbed = this.#absorbed
    if (absorbed !== null) {
      const held =
        'keyUp_HNC' in absorbed
          ? [absorbed.keyUp_HNC, absorbed.valueUp_HVC]
          : [absorbed.keyUp_HCN.q, absorbed.valueUp_HVC.q]
      for (const tensor of held) tensor.dispose()
    }
    this.#absorbed = null
  }
}
