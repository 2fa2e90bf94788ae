/**
 * @file Multi-head Latent Attention (DeepSeek-V2 report 2.1, V3 report eq. 1-11), and its sparse form with a lightning
 * indexer (DeepSeek-V3.2 report 2.1).
 *
 * Legend: B batch, T time, H heads, N nope features, R rope features, V value features, C kv_lora_rank, S keys, K keys
 * that the indexer selects.
 */
import {
  type AttentionOptions,
  attention,
  checkOptions,
  checkShared,
  concat,
  disposeAfterUse,
  forkInit,
  type InitOptions,
  initNames,
  Linear,
  latentAttention,
  linearRows,
  Module,
  MoeError,
  mlaKeyValue,
  needAxes,
  noGrad,
  type OptionNames,
  RmsNorm,
  rope,
  rowsPerBlock,
  type Shape,
  scope,
  type Tensor,
  withKept,
  withRecomputed,
} from '@moe/core'
import { AbsorbedProjections } from './absorbed-projections.ts'
import type { CacheFeatures } from './cache/cache-rows.ts'
import { latentFeatures } from './cache/kv-cache.ts'
import { SelectedRows } from './cache/selected-rows.ts'
import { needSequences, refuseWithCache, type SequenceCache } from './cache/sequence-cache.ts'
import { checkMlaConfig, type MlaConfig } from './config.ts'
import { type IndexQueries, LightningIndexer } from './lightning-indexer.ts'
import { type RotaryEmbedding, type RotaryTables, sharedRotary, softmaxScale } from './rotary.ts'
import { chunkSize, type IndexInputs, selectKeys, sparseAttention } from './sparse-attention.ts'

/** Options of an MLA layer: initialization and shared tables. */
export interface MlaOptions extends InitOptions {
  /** Rotation tables to share between layers. Default: its own tables. */
  readonly rotary?: RotaryEmbedding | undefined
  /** Epsilon of the norms on the latents. Default 1e-6, which the released models use regardless of rms_norm_eps. */
  readonly latentNormEps?: number | undefined
  /**
   * Whether sparse attention has an indexer. Without one, the layer attends to the keys that an earlier layer has
   * selected, as in GLM-5.2: pass them to `forward` as `selected`. Default true.
   */
  readonly indexer?: boolean | undefined
}

const optionNames: OptionNames<MlaOptions> = { ...initNames, rotary: true, latentNormEps: true, indexer: true }

/** Options of a forward pass. */
export interface MlaForwardOptions {
  /** Positions of the tokens, row-major `[B, T]`. Default: 0 to T-1, or the positions after those in the cache. */
  readonly positions?: Int32Array | undefined
  /**
   * `i32 [B, T]`: first position in its row that each token sees, for rows that contain several texts; see `attention`.
   * Not with a cache. Default 0.
   */
  readonly starts?: Tensor | undefined
  /**
   * Cache with the earlier tokens, for inference only. The new tokens are written to it; the caller advances it once
   * for all layers.
   */
  readonly cache?: SequenceCache | undefined
  /** Index of this layer in the cache. Default 0. */
  readonly layer?: number | undefined
  /** Up to this many new tokens are computed in absorbed form; for more, keys and values are expanded. Default 8. */
  readonly absorbUpTo?: number | undefined
  /**
   * Receives the loss of the indexer, `[B, T]` (DeepSeek-V3.2 report eq. 4): for each token, how much the index scores
   * of its keys diverge from its attention to them. It trains the indexer alone. Not with a cache.
   */
  readonly onIndexerLoss?: ((loss_BT: Tensor) => void) | undefined
  /**
   * If true, tokens attend to all keys instead of those that the indexer selects, and the loss of the indexer covers
   * all keys (eq. 3): to warm up a new indexer. Not with a cache. Default false.
   */
  readonly dense?: boolean | undefined
  /**
   * The keys that each token attends to, from `onSelected` of the layer whose indexer this layer shares, for the same
   * tokens. Required by a layer without an indexer if there are more than index_topk keys.
   */
  readonly selected?: Tensor | undefined
  /**
   * Receives the positions of the keys that the indexer selects for each token, `i32 [B, T, index_topk]`, for layers
   * that share it. Positions that a token must not see do not count. Not called if tokens attend to all keys.
   */
  readonly onSelected?: ((selected_BTK: Tensor) => void) | undefined
}

const forwardNames: OptionNames<MlaForwardOptions> = {
  positions: true,
  starts: true,
  cache: true,
  layer: true,
  absorbUpTo: true,
  onIndexerLoss: true,
  dense: true,
  selected: true,
  onSelected: true,
}

/** Maximum number of elements of expanded keys and values in prefill with a cache: 1 GiB. Tests reduce it. */
export const limits = { expanded: 2 ** 28 }

/** The least number of heads with `width` rows each that are whole blocks of rows. */
function headsPerBlock(block: number, width: number): number {
  let heads = 1
  while ((heads * width) % block !== 0) heads++
  return heads
}

/** What a forward pass with a cache computes. */
interface CachedResult {
  readonly out: Tensor
  readonly selected?: Tensor | undefined
}

/**
 * Causal attention whose keys and values are expanded from one low-rank latent per token. Maps `[B, T, hidden]` to the
 * same shape.
 */
export class MultiHeadLatentAttention extends Module {
  /** Query projection without compression; only present if q_lora_rank is null. */
  declare q_proj?: Linear
  /** W_DQ `[q_lora_rank, hidden_size]` (eq. 6). Missing if q_lora_rank is null, like the two below. */
  declare q_a_proj?: Linear
  /** Norm of the compressed query. */
  declare q_a_layernorm?: RmsNorm
  /**
   * W_UQ and W_QR `[heads * (nope + rope), q_lora_rank]` (eq. 7 and 8). Each head has nope features first, then rope
   * features.
   */
  declare q_b_proj?: Linear
  /** W_DKV and W_KR `[kv_lora_rank + rope, hidden_size]` (eq. 1 and 3). */
  kv_a_proj_with_mqa: Linear
  /** Norm of the latent. */
  kv_a_layernorm: RmsNorm
  /**
   * W_UK and W_UV `[heads * (nope + v), kv_lora_rank]` (eq. 2 and 5). Each head has the nope features of the key first,
   * then the value.
   */
  kv_b_proj: Linear
  /** W_O `[hidden_size, heads * v]` (eq. 11). */
  o_proj: Linear
  /** Selects the keys of sparse attention; only present if index_topk is set, and not if the layer shares another's. */
  declare indexer?: LightningIndexer
  /**
   * Recomputes queries, keys and values from the latents in the backward pass instead of keeping them (V3 report
   * 3.2.3). The attention itself is not recomputed. May be changed between passes. Default false.
   */
  recompute = false
  readonly #config: MlaConfig
  readonly #scale: number
  readonly #rotary: RotaryEmbedding
  readonly #absorbed: AbsorbedProjections

  /** @throws MoeError E_CONFIG for invalid sizes */
  constructor(config: MlaConfig, options: MlaOptions = {}) {
    super()
    checkMlaConfig(config)
    checkOptions('MultiHeadLatentAttention', options, optionNames)
    const { hidden_size: hidden, num_attention_heads: heads, kv_lora_rank: latent, qk_rope_head_dim: ropeDim } = config
    const { latentNormEps = 1e-6, rotary, indexer = true, ...init } = options
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
    if (config.index_topk != null && indexer) this.indexer = new LightningIndexer(config, child('indexer'))
    this.#config = config
    this.#absorbed = new AbsorbedProjections(config)
    this.#scale = softmaxScale(config)
    this.#rotary = sharedRotary(rotary, config)
  }

  /** Elements that a cache of this layer stores per token: latent and rope key, and the key of the indexer. */
  get cacheFeatures(): CacheFeatures {
    const features = latentFeatures('MultiHeadLatentAttention', this.#config)
    return this.indexer === undefined ? { ...features, index: 0 } : features
  }

  /**
   * Maps x `[batch, time, hidden]` to the same shape. With a cache, gradients are not recorded, and up to `absorbUpTo`
   * tokens attend to the latents directly; if there are more than index_topk keys, all tokens do.
   * @throws MoeError E_SHAPE, E_CONFIG
   */
  forward(x_BTD: Tensor, options: MlaForwardOptions = {}): Tensor {
    needAxes('MultiHeadLatentAttention', x_BTD, ['batch', 'time', this.#config.hidden_size])
    checkShared('MultiHeadLatentAttention.forward', options, forwardNames)
    const { cache, positions, starts } = options
    const time = x_BTD.shape[1]
    const { backend } = x_BTD
    if (cache === undefined) {
      const first = () => {
        const tables = this.#rotary.first(time, backend)
        return starts === undefined ? tables : this.#rotary.from(starts, tables)
      }
      const tables = positions ? this.#rotary.at(positions, x_BTD.shape, backend) : first()
      const { down, both } = this.#project(x_BTD)
      const through = this.recompute ? withRecomputed : withKept
      return through(
        (queryInput, keyInput) => {
          const flat = this.#queries(this.#compressed(queryInput), tables)
          const q = this.#rotate(flat, tables)
          // No gradient rule reads it, nor `kv` below.
          disposeAfterUse(flat)
          return [q, ...this.#keyValue(this.#latent(keyInput), this.#rotate(this.#ropeKey(keyInput), tables))]
        },
        (q, k, v) =>
          this.#isSparse(time, options)
            ? this.#attendSparse(x_BTD, down, tables, [q, k, v], options)
            : this.#attend(q, k, v, { starts }),
        down,
        both,
      )
    }
    needSequences('MultiHeadLatentAttention', x_BTD, cache)
    refuseWithCache('MultiHeadLatentAttention', { starts, onIndexerLoss: options.onIndexerLoss, dense: options.dense })
    const { out, selected } = noGrad(() =>
      scope(() => {
        cache.reserve(time)
        const tables = positions
          ? this.#rotary.at(positions, x_BTD.shape, backend)
          : cache.next(time).tables(this.#rotary)
        return this.#cached(x_BTD, cache, tables, options)
      }),
    )
    if (selected) options.onSelected?.(selected)
    return out
  }

  /**
   * The two products with `x`, from which queries and latents are computed. Adjacent calls, because a backend may
   * combine them.
   */
  #project(x: Tensor): { down: Tensor; both: Tensor } {
    return { down: (this.q_proj ?? (this.q_a_proj as Linear)).forward(x), both: this.kv_a_proj_with_mqa.forward(x) }
  }

  /** The normalized compressed queries `[B, T, q_lora_rank]`. Without compression, `down` itself. */
  #compressed(down: Tensor): Tensor {
    return this.q_a_layernorm?.forward(down) ?? down
  }

  /** Queries `[B, T, H, N + R]`, scaled by their positions if configured, with the rope part not yet rotated. */
  #queries(compressed: Tensor, { queryFactors }: RotaryTables): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, qk_rope_head_dim: ropeDim } = this.#config
    // Before the projection, which is linear, there are fewer features to scale.
    const scaled = queryFactors === undefined ? compressed : compressed.mul(queryFactors)
    const flat = this.q_b_proj?.forward(scaled) ?? scaled
    return flat.reshape([compressed.shape[0], compressed.shape[1], heads, nope + ropeDim])
  }

  /** Rotates the last R features of each head. They follow the other features of x, or those of `plain`. */
  #rotate(x: Tensor, { cos, sin }: RotaryTables, plain?: Tensor): Tensor {
    return rope(x, cos, sin, { interleaved: this.#config.rope_interleave ?? true, plain })
  }

  /** The normalized latents `[B, T, C]` from the output of `kv_a_proj_with_mqa`. */
  #latent(both: Tensor): Tensor {
    return this.kv_a_layernorm.forward(both.narrow(2, 0, this.#config.kv_lora_rank))
  }

  /** The rope keys after the latents, one head for all: the last R of `[B, T, C + R]` as `[B, T, 1, R]`. */
  #ropeKey(both: Tensor): Tensor {
    const [batch, time, features] = both.shape
    const ropeDim = this.#config.qk_rope_head_dim
    return both.narrow(2, features - ropeDim, features).reshape([batch, time, 1, ropeDim])
  }

  /**
   * Multi-head form, for training and prefill: expands every head's keys `[B, S, H, N + R]` and values `[B, S, H, V]`
   * from the latents.
   */
  #keyValue(latent_BSC: Tensor, ropeKey_BS1R: Tensor): readonly [k: Tensor, v: Tensor] {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, v_head_dim: value } = this.#config
    const [batch, keys] = latent_BSC.shape
    const kv = this.kv_b_proj.forward(latent_BSC).reshape([batch, keys, heads, nope + value])
    const { k, v } = mlaKeyValue(kv, ropeKey_BS1R, nope)
    if (v !== kv) disposeAfterUse(kv)
    return [k, v]
  }

  #attend(q_BTHD: Tensor, k: Tensor, v: Tensor, seen: Pick<AttentionOptions, 'lengths' | 'starts'>): Tensor {
    const [batch, time] = q_BTHD.shape
    const out = attention(q_BTHD, k, v, { scale: this.#scale, ...seen })
    return this.o_proj.forward(out.reshape([batch, time, v.shape[2] * v.shape[3]]))
  }

  /** Whether a forward pass of so many tokens without a cache needs the indexer, or its selection. */
  #isSparse(time: number, { dense = false, onIndexerLoss }: MlaForwardOptions): boolean {
    const { index_topk: count } = this.#config
    const hasLoss = this.indexer !== undefined && onIndexerLoss !== undefined
    return count != null && (hasLoss || (time > count && !dense))
  }

  /** The output for tokens x whose keys are their own, with the losses of the indexer. Its input gets no gradient. */
  #attendSparse(
    x: Tensor,
    down: Tensor,
    tables: RotaryTables,
    [q, k, v]: readonly [Tensor, Tensor, Tensor],
    options: MlaForwardOptions,
  ): Tensor {
    const { indexer } = this
    const { starts, dense = false, onIndexerLoss, onSelected } = options
    const count = this.#config.index_topk as number
    const hasLoss = indexer !== undefined && onIndexerLoss !== undefined
    const index = indexer && this.#indexInputs(indexer, x, down, tables, hasLoss)
    const isChosen = x.shape[1] > count && !dense
    const selected =
      index === undefined
        ? this.#given(options, x.shape)
        : isChosen && onSelected !== undefined
          ? noGrad(() => scope(() => selectKeys(index, count, starts)))
          : undefined
    const wanted = { scale: this.#scale, count, starts, dense, loss: hasLoss, selected }
    const { out, loss } = sparseAttention(q, k, v, index, wanted)
    if (loss !== undefined) onIndexerLoss?.(loss)
    if (index !== undefined && selected !== undefined) onSelected?.(selected)
    return this.o_proj.forward(out.reshape([out.shape[0], out.shape[1], v.shape[2] * v.shape[3]]))
  }

  /** What attention without a cache reads of the indexer. */
  #indexInputs(
    indexer: LightningIndexer,
    x: Tensor,
    down: Tensor,
    tables: RotaryTables,
    recorded: boolean,
  ): IndexInputs {
    const input = x.detach()
    const compressed = noGrad(() => this.#compressed(down)).detach()
    const run = recorded ? <T>(fn: () => T) => fn() : noGrad
    return run(() => ({ ...indexer.queries(input, compressed, tables), keys: indexer.keys(input, tables) }))
  }

  /** The selection that a layer without an indexer needs. @throws MoeError E_ATTR, E_SHAPE */
  #given({ selected }: MlaForwardOptions, [batch, time]: Shape): Tensor {
    if (selected === undefined) {
      throw new MoeError({
        code: 'E_ATTR',
        op: 'MultiHeadLatentAttention',
        problem: 'the option selected is missing, and the layer has no indexer of its own',
        fix: 'pass what onSelected of the layer with the indexer receives for the same tokens',
      })
    }
    needAxes('MultiHeadLatentAttention', selected, [batch, time, this.#config.index_topk as number])
    return selected
  }

  /** The output, and the selection if there is one and `onSelected` wants it. */
  #cached(x: Tensor, cache: SequenceCache, tables: RotaryTables, options: MlaForwardOptions): CachedResult {
    const { layer = 0, absorbUpTo = 8 } = options
    const [batch, time] = x.shape
    const { down, both } = this.#project(x)
    const oneHead = (t: Tensor) => t.reshape([batch, time, 1, t.shape[2]])
    const row = this.#rotate(oneHead(both), tables, oneHead(this.#latent(both)))
    cache.write(layer, row.reshape(both.shape))
    const compressed = this.#compressed(down)
    const q = this.#queries(compressed, tables)
    const { lengths, pages } = cache.next(time)
    const isShort = time <= absorbUpTo
    const keys = Math.max(...cache.lengths) + time
    if (this.indexer !== undefined) cache.write(layer, this.indexer.keys(x, tables), 'index')
    const { index_topk: count } = this.#config
    // The shapes of short passes, which may be recorded, depend on the capacity instead of the length.
    const within = isShort ? cache.capacity : keys
    if (count != null && within > count) {
      const index = this.indexer?.queries(x, compressed, tables) ?? this.#given(options, x.shape)
      return this.#selectedForward(q, tables, index, cache, within, options)
    }
    if (isShort) {
      const attend = (qAbsorbed: Tensor) =>
        latentAttention(qAbsorbed, cache.rows(layer), lengths, { ...this.#latentOptions, pages })
      return { out: this.#absorbedForward(q, tables, attend) }
    }
    const rows = cache.first(layer, keys).cast('f32')
    const latents = rows.narrow(2, 0, this.#config.kv_lora_rank)
    return { out: this.#attendByHeads(this.#rotate(q, tables), latents, this.#ropeKey(rows), lengths) }
  }

  /** Attends to cached latents in multi-head form, to so many heads at a time that their keys and values are not too large. */
  #attendByHeads(q_BTHD: Tensor, latent_BSC: Tensor, ropeKey_BS1R: Tensor, lengths: Tensor): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, qk_rope_head_dim: ropeDim, v_head_dim } = this.#config
    const { weight } = this.kv_b_proj
    const [batch, time] = q_BTHD.shape
    const width = nope + v_head_dim
    // Keys and values as one product, and apart.
    const perHead = batch * latent_BSC.shape[1] * (2 * width + ropeDim)
    const least = headsPerBlock(rowsPerBlock(weight), width)
    const step = least * Math.max(1, Math.floor(limits.expanded / (perHead * least)))
    if (step >= heads) return this.#attend(q_BTHD, ...this.#keyValue(latent_BSC, ropeKey_BS1R), { lengths })
    const outs: Tensor[] = []
    for (let from = 0; from < heads; from += step) {
      const to = Math.min(heads, from + step)
      const some = () => {
        const kv = linearRows(latent_BSC, weight, from * width, to * width)
        const { k, v } = mlaKeyValue(
          kv.reshape([...latent_BSC.shape.slice(0, 2), to - from, width]),
          ropeKey_BS1R,
          nope,
        )
        return attention(q_BTHD.narrow(2, from, to), k, v, { scale: this.#scale, lengths })
      }
      outs.push(scope(some))
    }
    return this.o_proj.forward(concat(outs, 2).reshape([batch, time, heads * v_head_dim]))
  }

  /**
   * Attends to selected cached keys in latent space: each query reads its rows as pages of one row.
   * @param index queries of the indexer, or the positions `[B, T, K]` that another has selected
   * @param within number of positions among which to select
   */
  #selectedForward(
    q_BTHD: Tensor,
    tables: RotaryTables,
    index: IndexQueries | Tensor,
    cache: SequenceCache,
    within: number,
    { layer = 0, onSelected }: MlaForwardOptions,
  ): CachedResult {
    const { num_attention_heads: heads, index_topk } = this.#config
    const [batch, time] = q_BTHD.shape
    const rows = new SelectedRows(cache, layer, time, index_topk as number)
    const select = 'q' in index ? rows.selector(index, within) : (from: number, to: number) => index.narrow(1, from, to)
    const chunk = chunkSize(batch * Math.max(within, heads * cache.features))
    const outs: Tensor[] = []
    const all: Tensor[] = []
    for (let from = 0; from < time; from += chunk) {
      const to = Math.min(time, from + chunk)
      const part = (t: Tensor) => t.narrow(1, from, to)
      const [out, selected] = scope(() => {
        const selected = select(from, to)
        const { pages, lengths } = rows.read(selected, from)
        const turn = { cos: part(tables.cos), sin: part(tables.sin) }
        const attended = this.#absorbedForward(part(q_BTHD), turn, q => {
          const perQuery = q.reshape([batch * (to - from), 1, heads, cache.features])
          return latentAttention(perQuery, rows.pool, lengths, { ...this.#latentOptions, pages })
        })
        return [attended, selected]
      })
      outs.push(out)
      all.push(selected)
    }
    const joined = (parts: readonly Tensor[]) => (parts.length === 1 ? parts[0] : concat(parts, 1))
    return { out: joined(outs), selected: onSelected && 'q' in index ? joined(all) : undefined }
  }

  get #latentOptions() {
    return { scale: this.#scale, valueDim: this.#config.kv_lora_rank }
  }

  /**
   * Multi-query form in latent space: score = (W_UK^T q_nope) . c + q_rope . k_rope, out = W_UV (sum p c).
   * @param attend maps absorbed queries `[B, T, H, C + R]` to sums of latents, with B * T * H * C elements
   */
  #absorbedForward(q_BTHD: Tensor, tables: RotaryTables, attend: (q_BTHC: Tensor) => Tensor): Tensor {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, kv_lora_rank: rank, v_head_dim: value } = this.#config
    const [batch, time] = q_BTHD.shape
    const { up, down } = this.#absorbed.products(this.kv_b_proj.weight, batch * time)
    // With a single token, the heads are already the leading axis.
    const one = batch * time === 1
    const byHead = (t: Tensor) => (one ? t : t.permute([2, 0, 1, 3])).reshape([heads, batch * time, t.shape[3]])
    const perToken = (t: Tensor) =>
      one ? t.reshape([1, 1, heads, t.shape[2]]) : t.reshape([heads, batch, time, t.shape[2]]).permute([1, 2, 0, 3])
    const qLatent = perToken(up(byHead(q_BTHD.narrow(3, 0, nope))))
    const q = this.#rotate(q_BTHD, tables, qLatent)
    const context_BTHC = attend(q).reshape([batch, time, heads, rank])
    const out = perToken(down(byHead(context_BTHC)))
    return this.o_proj.forward(out.reshape([batch, time, heads * value]))
  }

  /** Frees the copies of kv_b_proj that absorbed decoding keeps. They are recreated when needed. */
  releaseAbsorbed(): void {
    this.#absorbed.release()
  }
}
