/** @file For tests: configurations that exercise all parts of the export. */
import type { DeepSeekConfigInput } from '../config.ts'
import { presets } from '../presets.ts'

const v3 = {
  ...presets.tiny,
  vocab_size: 320,
  hidden_size: 96,
  intermediate_size: 128,
  moe_intermediate_size: 32,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  n_routed_experts: 16,
  num_experts_per_tok: 4,
  n_group: 4,
  topk_group: 2,
  q_lora_rank: 64,
  kv_lora_rank: 32,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 24,
  initializer_range: 0.15,
  bos_token_id: 1,
  eos_token_id: 0,
} satisfies DeepSeekConfigInput

const yarn = { type: 'yarn', factor: 4, original_max_position_embeddings: 16, beta_fast: 32, beta_slow: 1 }

const v2 = {
  ...v3,
  model_type: 'deepseek_v2',
  topk_method: 'greedy',
  scoring_func: 'softmax',
  norm_topk_prob: false,
  q_lora_rank: null,
  routed_scaling_factor: 1,
  num_nextn_predict_layers: 0,
} satisfies DeepSeekConfigInput

const glm = {
  ...v3,
  model_type: 'glm4_moe_lite',
  n_group: 1,
  topk_group: 1,
  qk_nope_head_dim: 48,
  v_head_dim: 64,
  rope_theta: 1e6,
  rms_norm_eps: 1e-6,
  bos_token_id: null,
  eos_token_id: [0, 1, 2],
} satisfies DeepSeekConfigInput

const youtu = {
  model_type: 'youtu',
  vocab_size: 320,
  hidden_size: 96,
  intermediate_size: 128,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  q_lora_rank: 64,
  kv_lora_rank: 32,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 24,
  rope_theta: 1.6e6,
  initializer_range: 0.15,
  bos_token_id: 1,
  eos_token_id: 0,
} satisfies DeepSeekConfigInput

const llama = {
  model_type: 'llama',
  vocab_size: 320,
  hidden_size: 96,
  intermediate_size: 128,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
  initializer_range: 0.15,
} satisfies DeepSeekConfigInput

/** Configurations by name. llama.cpp computes the same as this package for all of them. */
export const cases = {
  v3,
  'V3 with YaRN': { ...v3, rope_scaling: { ...yarn, mscale: 1, mscale_all_dim: 1 } },
  'V3 with YaRN without score scaling': { ...v3, rope_scaling: yarn },
  'V3 with YaRN of two temperatures': { ...v3, rope_scaling: { ...yarn, mscale: 1, mscale_all_dim: 0.5 } },
  'V3 with RoPE on halves': { ...v3, rope_interleave: false },
  'V3 without compressed queries': { ...v3, q_lora_rank: null },
  'V3 without shared experts': { ...v3, n_shared_experts: 0 },
  'V3 with tied embeddings': { ...v3, tie_word_embeddings: true },
  'V3 without experts': { ...v3, n_routed_experts: null, num_experts_per_tok: null, n_group: null, topk_group: null },
  GLM: glm,
  Youtu: youtu,
  'V2-Lite': { ...v2, rope_scaling: { ...yarn, mscale: 0.7, mscale_all_dim: 0.7 } },
  llama,
  'llama with YaRN': { ...llama, rope_scaling: yarn },
} as const satisfies Record<string, DeepSeekConfigInput>
