/**
 * @file Maps the weights of a model to llama.cpp's tensor names and layout.
 *
 * Legend: H heads, N and R features of a head without and with rotary embedding, V value features of a head, C latent features.
 */
import type { GgufEncoding, GgufTensor } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { type DeepSeekConfig, isMoELayer } from '../config.ts'
import { sharedExperts } from './architecture.ts'

/** The weights of a model by checkpoint key, as f32. */
export interface WeightSource {
  /** Row-major shape of a weight, or undefined if there is none. */
  shape(key: string): readonly number[] | undefined
  read(key: string): Promise<Float32Array>
}

/** Elements per quantized block. Rows of other lengths are stored as f16. */
const BLOCK = 32

/**
 * Returns all tensors of the file. Matrices are stored in the given type; norms, the gate and its bias are always f32, as in llama.cpp's own files.
 *
 * @throws {MoeError} `E_CHECKPOINT` for weights that are missing or have other shapes than the configuration requires
 */
export function tensorsOf(config: DeepSeekConfig, source: WeightSource, type: GgufEncoding): GgufTensor[] {
  const { hidden_size: hidden, vocab_size: vocabulary } = config
  const out = new TensorList(source, type)
  out.matrix('token_embd', 'model.embed_tokens', [vocabulary, hidden])
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    const from = `model.layers.${layer}`
    const to = `blk.${layer}`
    out.vector(`${to}.attn_norm.weight`, `${from}.input_layernorm.weight`, hidden)
    if (config.model_type === 'llama') addHeads(out, config, to, `${from}.self_attn`)
    else addLatentAttention(out, config, to, `${from}.self_attn`)
    out.vector(`${to}.ffn_norm.weight`, `${from}.post_attention_layernorm.weight`, hidden)
    if (isMoELayer(config, layer)) addExperts(out, config, to, `${from}.mlp`)
    else addMlp(out, to, '', `${from}.mlp`, hidden, config.intermediate_size)
  }
  out.vector('output_norm.weight', 'model.norm.weight', hidden)
  if (!config.tie_word_embeddings) out.matrix('output', 'lm_head', [vocabulary, hidden])
  return out.tensors
}

function addHeads(out: TensorList, config: DeepSeekConfig, to: string, from: string): void {
  const { hidden_size: hidden, num_attention_heads: heads, num_key_value_heads: groups, v_head_dim: features } = config
  const permute = pairRotaryRows(config, features, 0)
  out.matrix(`${to}.attn_q`, `${from}.q_proj`, [heads * features, hidden], permute)
  out.matrix(`${to}.attn_k`, `${from}.k_proj`, [groups * features, hidden], permute)
  out.matrix(`${to}.attn_v`, `${from}.v_proj`, [groups * features, hidden])
  out.matrix(`${to}.attn_output`, `${from}.o_proj`, [hidden, heads * features])
}

function addLatentAttention(out: TensorList, config: DeepSeekConfig, to: string, from: string): void {
  const { hidden_size: hidden, num_attention_heads: heads, q_lora_rank: rank, kv_lora_rank: latent } = config
  const { qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: value } = config
  const queries = heads * (nope + rope)
  const permute = pairRotaryRows(config, nope + rope, nope)
  if (rank === null) out.matrix(`${to}.attn_q`, `${from}.q_proj`, [queries, hidden], permute)
  else {
    out.matrix(`${to}.attn_q_a`, `${from}.q_a_proj`, [rank, hidden])
    out.vector(`${to}.attn_q_a_norm.weight`, `${from}.q_a_layernorm.weight`, rank)
    out.matrix(`${to}.attn_q_b`, `${from}.q_b_proj`, [queries, rank], permute)
  }
  const keyRows = pairRotaryRows(config, latent + rope, latent)
  out.matrix(`${to}.attn_kv_a_mqa`, `${from}.kv_a_proj_with_mqa`, [latent + rope, hidden], keyRows)
  out.vector(`${to}.attn_kv_a_norm.weight`, `${from}.kv_a_layernorm.weight`, latent)
  const key = `${from}.kv_b_proj.weight`
  const shape = [heads * (nope + value), latent]
  // W_UK, which maps queries to latents, is stored transposed, [H, C, N]; W_UV as it is, [H, V, C].
  out.cut(`${to}.attn_k_b.weight`, key, shape, [heads, latent, nope], kv => keyUp(kv, heads, nope, value, latent))
  out.cut(`${to}.attn_v_b.weight`, key, shape, [heads, value, latent], kv => valueUp(kv, heads, nope, value, latent))
  out.matrix(`${to}.attn_output`, `${from}.o_proj`, [hidden, heads * value])
}

function addExperts(out: TensorList, config: DeepSeekConfig, to: string, from: string): void {
  const { hidden_size: hidden, moe_intermediate_size: width, n_routed_experts } = config
  const experts = n_routed_experts as number
  out.plain(`${to}.ffn_gate_inp.weight`, `${from}.gate.weight`, [experts, hidden])
  if (config.topk_method === 'noaux_tc') {
    out.vector(`${to}.exp_probs_b.bias`, `${from}.gate.e_score_correction_bias`, experts)
  }
  out.stacked(`${to}.ffn_gate_exps`, `${from}.experts`, 'gate_proj', [experts, width, hidden])
  out.stacked(`${to}.ffn_down_exps`, `${from}.experts`, 'down_proj', [experts, hidden, width])
  out.stacked(`${to}.ffn_up_exps`, `${from}.experts`, 'up_proj', [experts, width, hidden])
  const shared = config.n_shared_experts > 0 ? `${from}.shared_experts` : null
  addMlp(out, to, '_shexp', shared, hidden, sharedExperts(config) * width)
}

/** A SwiGLU network; zeros if `from` is null. */
function addMlp(out: TensorList, to: string, suffix: string, from: string | null, hidden: number, width: number): void {
  for (const part of ['gate', 'down', 'up']) {
    const shape = part === 'down' ? [hidden, width] : [width, hidden]
    out.matrix(`${to}.ffn_${part}${suffix}`, from && `${from}.${part}_proj`, shape)
  }
}

/** Collects tensors and checks the shapes of their weights. */
class TensorList {
  readonly tensors: GgufTensor[] = []
  readonly #source: WeightSource
  readonly #type: GgufEncoding

  constructor(source: WeightSource, type: GgufEncoding) {
    this.#source = source
    this.#type = type
  }

  /** Adds a weight that stays f32. */
  plain(name: string, key: string, shape: readonly number[]): void {
    this.#check(key, shape)
    this.tensors.push({ name, type: 'f32', shape, values: () => this.#source.read(key) })
  }

  vector(name: string, key: string, length: number): void {
    this.plain(name, key, [length])
  }

  /** Adds a matrix in the requested type, transformed by `change`; zeros if the key is null. */
  matrix(
    name: string,
    key: string | null,
    shape: readonly number[],
    change: (values: Float32Array, rowLength: number) => Float32Array = values => values,
  ): void {
    const [rows, rowLength] = shape
    const values =
      key === null
        ? () => new Float32Array(rows * rowLength)
        : async () => change(await this.#source.read(`${key}.weight`), rowLength)
    if (key !== null) this.#check(`${key}.weight`, shape)
    this.#add(`${name}.weight`, shape, values)
  }

  /** Adds a part of a weight. */
  cut(
    name: string,
    key: string,
    from: readonly number[],
    shape: readonly number[],
    part: (values: Float32Array) => Float32Array,
  ): void {
    this.#check(key, from)
    this.#add(name, shape, async () => part(await this.#source.read(key)))
  }

  /** Adds one tensor with the weights of all experts, which are read one at a time. */
  stacked(name: string, from: string, part: string, shape: readonly number[]): void {
    const source = this.#source
    const keys = Array.from({ length: shape[0] }, (_, expert) => `${from}.${expert}.${part}.weight`)
    for (const key of keys) this.#check(key, shape.slice(1))
    this.#add(`${name}.weight`, shape, async function* () {
      for (const key of keys) yield await source.read(key)
    })
  }

  #add(name: string, shape: readonly number[], values: GgufTensor['values']): void {
    const quantized = this.#type === 'q8_0' || this.#type === 'q4_0'
    const type = quantized && (shape.at(-1) as number) % BLOCK !== 0 ? 'f16' : this.#type
    this.tensors.push({ name, type, shape, values })
  }

  #check(key: string, shape: readonly number[]): void {
    const found = this.#source.shape(key)
    if (found !== undefined && found.join() === shape.join()) return
    const problem =
      found === undefined ? 'is missing' : `has the shape [${found.join(', ')}], expected [${shape.join(', ')}]`
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: 'exportGguf',
      problem: `the weight ${JSON.stringify(key)} ${problem}`,
      fix: 'use the config.json and weights of the same model',
      details: { key },
    })
  }
}

/**
 * llama.cpp rotates adjacent pairs, as V2 and V3 store them. For models that rotate the two halves of the features (Llama, and
 * rope_interleave false), this returns a function that reorders the rows into pairs.
 *
 * @param period rows of a head; those from `first` on are rotated
 */
function pairRotaryRows(config: DeepSeekConfig, period: number, first: number) {
  if (config.rope_interleave) return undefined
  const half = (period - first) / 2
  return (values: Float32Array, rowLength: number): Float32Array => {
    const out = values.slice()
    for (let head = 0; head < values.length; head += period * rowLength) {
      const start = head + first * rowLength
      for (let pair = 0; pair < half; pair++) {
        for (const [side, row] of [pair, half + pair].entries()) {
          const from = start + row * rowLength
          out.set(values.subarray(from, from + rowLength), start + (2 * pair + side) * rowLength)
        }
      }
    }
    return out
  }
}

/** The transposed key part, `[H, C, N]`, of kv_b_proj `[H (N + V), C]`. */
function keyUp(kv: Float32Array, heads: number, nope: number, value: number, latent: number): Float32Array {
  const out = new Float32Array(heads * latent * nope)
  for (let head = 0; head < heads; head++) {
    const from = head * (nope + value) * latent
    for (let c = 0; c < latent; c++) {
      const to = (head * latent + c) * nope
      for (let n = 0; n < nope; n++) out[to + n] = kv[from + n * latent + c]
    }
  }
  return out
}

/** The value part, `[H, V, C]`, of kv_b_proj `[H (N + V), C]`. */
function valueUp(kv: Float32Array, heads: number, nope: number, value: number, latent: number): Float32Array {
  const out = new Float32Array(heads * value * latent)
  for (let head = 0; head < heads; head++) {
    const from = (head * (nope + value) + nope) * latent
    out.set(kv.subarray(from, from + value * latent), head * value * latent)
  }
  return out
}
