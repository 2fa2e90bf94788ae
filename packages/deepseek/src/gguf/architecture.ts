/** @file Maps configurations to the architectures of llama.cpp: `deepseek2` (V2, V3, latent attention) and `llama` (DeepSeek LLM). */
import { rotaryAmplitude, yarnMscale } from '@moe/attention-mla'
import type { GgufValue } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import type { DeepSeekConfig } from '../config.ts'

/** Metadata of a GGUF file, without `general.*` and `tokenizer.*`. */
export interface Architecture {
  readonly name: 'deepseek2' | 'llama'
  readonly metadata: Readonly<Record<string, GgufValue>>
  /** Differences between llama.cpp and the model, as sentences. */
  readonly notes: readonly string[]
}

const u32 = (value: number): GgufValue => ({ type: 'u32', value })
const f32 = (value: number): GgufValue => ({ type: 'f32', value })
const bool = (value: boolean): GgufValue => ({ type: 'bool', value })
const string = (value: string): GgufValue => ({ type: 'string', value })

/**
 * Returns the hyperparameters of a configuration (llama.cpp `src/llama-arch.cpp`, `src/models/deepseek2.cpp`, as of v0.5.0).
 *
 * @throws {MoeError} `E_CONFIG` for a configuration that llama.cpp cannot load, `E_UNSUPPORTED` for sparse attention, and for queries scaled by position
 */
export function architectureOf(config: DeepSeekConfig): Architecture {
  if (config.index_topk !== null) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: 'exportGguf',
      problem: `models with sparse attention (${config.model_type}) cannot be exported: their indexers have no place in the architecture deepseek2`,
      fix: 'run the model here, or save it in the Hugging Face layout with model.save(folder)',
    })
  }
  if (config.rope_scaling?.llama_4_scaling_beta) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: 'exportGguf',
      problem: `models of type ${config.model_type} cannot be exported: scaling queries by position is not part of the exported architecture deepseek2`,
      fix: 'run the model here, or save it in the Hugging Face layout with model.save(folder)',
    })
  }
  const latent = config.model_type !== 'llama'
  const name = latent ? 'deepseek2' : 'llama'
  const keys = { ...commonKeys(config), ...(latent ? latentKeys(config) : headKeys(config)), ...ropeKeys(config) }
  const metadata = Object.fromEntries(Object.entries(keys).map(([key, value]) => [`${name}.${key}`, value]))
  return { name, metadata, notes: latent ? notesOf(config) : [] }
}

type Keys = Record<string, GgufValue>

const commonKeys = (config: DeepSeekConfig): Keys => ({
  block_count: u32(config.num_hidden_layers),
  context_length: u32(config.max_position_embeddings),
  embedding_length: u32(config.hidden_size),
  feed_forward_length: u32(config.intermediate_size),
  vocab_size: u32(config.vocab_size),
  'attention.head_count': u32(config.num_attention_heads),
  'attention.layer_norm_rms_epsilon': f32(config.rms_norm_eps),
})

const headKeys = (config: DeepSeekConfig): Keys => ({
  'attention.head_count_kv': u32(config.num_key_value_heads),
  'attention.key_length': u32(config.v_head_dim),
  'attention.value_length': u32(config.v_head_dim),
})

/** llama.cpp computes latent attention in absorbed form, with the latent as the only key and value head. */
function latentKeys(config: DeepSeekConfig): Keys {
  const { kv_lora_rank: latent, qk_rope_head_dim: rotary, qk_nope_head_dim: nope } = config
  return {
    'attention.head_count_kv': u32(1),
    'attention.key_length': u32(latent + rotary),
    'attention.value_length': u32(latent),
    'attention.key_length_mla': u32(nope + rotary),
    'attention.value_length_mla': u32(config.v_head_dim),
    'attention.kv_lora_rank': u32(latent),
    ...queryRank(config),
    ...expertKeys(config),
  }
}

/** llama.cpp recognizes V2-Lite, which does not compress queries, by its number of layers. All others need a rank; 0 means no compression. */
function queryRank({ q_lora_rank: rank, num_hidden_layers: layers, vocab_size: vocabulary }: DeepSeekConfig): Keys {
  const lite = layers === 26 || layers === 27 || (layers === 48 && vocabulary === 128256)
  if (lite && rank !== null) {
    throw unloadable(
      `num_hidden_layers = ${layers} with q_lora_rank = ${rank}: llama.cpp loads models of ${layers} layers as V2-Lite, without q_lora_rank`,
      'use another number of layers, or set q_lora_rank to null',
    )
  }
  return lite ? {} : { 'attention.q_lora_rank': u32(rank ?? 0) }
}

function expertKeys(config: DeepSeekConfig): Keys {
  const { n_routed_experts: experts, num_experts_per_tok: chosen } = config
  if (experts === null || chosen === null) {
    // llama.cpp requires these keys even if no layer has experts.
    return {
      leading_dense_block_count: u32(config.num_hidden_layers),
      expert_feed_forward_length: u32(config.intermediate_size),
      expert_shared_count: u32(0),
    }
  }
  return {
    leading_dense_block_count: u32(config.first_k_dense_replace),
    expert_count: u32(experts),
    expert_used_count: u32(chosen),
    expert_shared_count: u32(sharedExperts(config)),
    expert_feed_forward_length: u32(config.moe_intermediate_size),
    expert_weights_scale: f32(config.routed_scaling_factor),
    expert_weights_norm: bool(config.norm_topk_prob),
    expert_gating_func: u32(config.scoring_func === 'sigmoid' ? 2 : 1),
    ...groupKeys(config, experts),
  }
}

/** llama.cpp requires a shared expert. If there is none, an expert of zeros is written. */
export const sharedExperts = (config: DeepSeekConfig): number => Math.max(1, config.n_shared_experts)

function groupKeys(config: DeepSeekConfig, experts: number): Keys {
  const { groups, kept } = groupsOf(config)
  if (kept === groups) return {}
  if (experts === groups) {
    throw unloadable(
      `n_group = ${groups} with one expert per group: llama.cpp scores a group by two experts`,
      'use groups of at least two experts',
    )
  }
  return { expert_group_count: u32(groups), expert_group_used_count: u32(kept) }
}

function groupsOf({ topk_method: method, n_group, topk_group }: DeepSeekConfig): { groups: number; kept: number } {
  const groups = method === 'greedy' ? 1 : (n_group ?? 1)
  return { groups, kept: Math.min(groups, topk_group ?? groups) }
}

/**
 * Keys of RoPE. llama.cpp has two settings for the effect of YaRN on amplitudes: `attn_factor` A multiplies cos and sin, and scores are
 * multiplied by (A (1 + 0.1 m ln factor))², where `yarn_log_multiplier` is 0.1 m. They are computed to match the amplitude and the scaling
 * of scores in modeling_deepseek.py. For V2 and V3, A = 1 and m = mscale_all_dim.
 */
function ropeKeys(config: DeepSeekConfig): Keys {
  const keys: Keys = {
    'rope.dimension_count': u32(config.qk_rope_head_dim),
    'rope.freq_base': f32(config.rope_theta),
  }
  const { rope_scaling: scaling } = config
  if (!scaling || scaling.factor === 1) return keys
  const { factor, original_max_position_embeddings: context, beta_fast = 32, beta_slow = 1 } = scaling
  if (factor < 1)
    throw unloadable(`rope_scaling.factor = ${factor} is below 1`, 'use a factor above 1, which extends the context')
  const amplitude = rotaryAmplitude(scaling)
  Object.assign(keys, {
    'rope.scaling.type': string('yarn'),
    'rope.scaling.factor': f32(factor),
    'rope.scaling.original_context_length': u32(context),
    'rope.scaling.yarn_beta_fast': f32(beta_fast),
    'rope.scaling.yarn_beta_slow': f32(beta_slow),
  })
  // Without a multiplier, llama.cpp itself scales cos and sin by this.
  let attnFactor = amplitude / yarnMscale(factor, 1)
  if (config.model_type !== 'llama') {
    const multiplier = (yarnMscale(factor, scaling.mscale_all_dim ?? 0) / amplitude - 1) / Math.log(factor)
    if (multiplier !== 0) {
      keys['rope.scaling.yarn_log_multiplier'] = f32(multiplier)
      attnFactor = amplitude
    }
  }
  if (Math.abs(attnFactor - 1) > 1e-7) keys['rope.scaling.attn_factor'] = f32(attnFactor)
  return keys
}

function notesOf(config: DeepSeekConfig): string[] {
  const notes: string[] = []
  const { groups, kept } = groupsOf(config)
  if (kept < groups && config.topk_method === 'group_limited_greedy') {
    notes.push('llama.cpp scores a group of experts by its best two, V2 by its best one: some tokens use other experts')
  }
  if (Math.abs(config.rms_norm_eps / 1e-6 - 1) > 1e-6) {
    notes.push(`llama.cpp normalizes latents with rms_norm_eps = ${config.rms_norm_eps} instead of 1e-6`)
  }
  if (config.num_nextn_predict_layers > 0) notes.push('the MTP modules are not exported')
  return notes
}

const unloadable = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'exportGguf', problem, fix })
