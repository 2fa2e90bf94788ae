/** @file Named configurations: the published models, and small ones that train on a laptop. */
import type { DeepSeekConfigInput, DenseConfigInput, LatentConfigInput } from './config.ts'

const v3: LatentConfigInput = {
  model_type: 'deepseek_v3',
  vocab_size: 129280,
  hidden_size: 7168,
  intermediate_size: 18432,
  moe_intermediate_size: 2048,
  num_hidden_layers: 61,
  num_attention_heads: 128,
  first_k_dense_replace: 3,
  n_routed_experts: 256,
  n_shared_experts: 1,
  num_experts_per_tok: 8,
  n_group: 8,
  topk_group: 4,
  topk_method: 'noaux_tc',
  scoring_func: 'sigmoid',
  norm_topk_prob: true,
  routed_scaling_factor: 2.5,
  q_lora_rank: 1536,
  kv_lora_rank: 512,
  qk_nope_head_dim: 128,
  qk_rope_head_dim: 64,
  v_head_dim: 128,
  max_position_embeddings: 163840,
  rope_theta: 10000,
  rope_scaling: {
    type: 'yarn',
    factor: 40,
    original_max_position_embeddings: 4096,
    beta_fast: 32,
    beta_slow: 1,
    mscale: 1,
    mscale_all_dim: 1,
  },
  rms_norm_eps: 1e-6,
  num_nextn_predict_layers: 1,
  bos_token_id: 0,
  eos_token_id: 1,
}

/** DeepSeek-V3.2: V3 with sparse attention. */
const v32: LatentConfigInput = {
  ...v3,
  model_type: 'deepseek_v32',
  index_topk: 2048,
  index_n_heads: 64,
  index_head_dim: 128,
}

const v2: LatentConfigInput = {
  ...v3,
  model_type: 'deepseek_v2',
  vocab_size: 102400,
  hidden_size: 5120,
  intermediate_size: 12288,
  moe_intermediate_size: 1536,
  num_hidden_layers: 60,
  first_k_dense_replace: 1,
  n_routed_experts: 160,
  n_shared_experts: 2,
  num_experts_per_tok: 6,
  topk_group: 3,
  topk_method: 'group_limited_greedy',
  scoring_func: 'softmax',
  norm_topk_prob: false,
  routed_scaling_factor: 16,
  // As in the released config.json: a rounded number, not 1 / sqrt(2).
  // biome-ignore lint/suspicious/noApproximativeNumericConstant: see above
  rope_scaling: { ...v3.rope_scaling, mscale: 0.707, mscale_all_dim: 0.707 },
  num_nextn_predict_layers: 0,
  bos_token_id: 100000,
  eos_token_id: 100001,
}

const v2Lite: LatentConfigInput = {
  ...v2,
  hidden_size: 2048,
  intermediate_size: 10944,
  moe_intermediate_size: 1408,
  num_hidden_layers: 27,
  num_attention_heads: 16,
  n_routed_experts: 64,
  n_group: 1,
  topk_group: 1,
  topk_method: 'greedy',
  routed_scaling_factor: 1,
  q_lora_rank: null,
}

const moonlight: LatentConfigInput = {
  ...v2Lite,
  model_type: 'deepseek_v3',
  vocab_size: 163840,
  intermediate_size: 11264,
  topk_method: 'noaux_tc',
  scoring_func: 'sigmoid',
  norm_topk_prob: true,
  routed_scaling_factor: 2.446,
  max_position_embeddings: 8192,
  rope_theta: 50000,
  rope_scaling: null,
  rms_norm_eps: 1e-5,
  bos_token_id: 163584,
  eos_token_id: 163585,
}

/** GLM-4.7-Flash: 30 billion parameters, of which 3 are used per token. Values are as large as queries and keys. */
const glmFlash: LatentConfigInput = {
  model_type: 'glm4_moe_lite',
  vocab_size: 154880,
  hidden_size: 2048,
  intermediate_size: 10240,
  moe_intermediate_size: 1536,
  num_hidden_layers: 47,
  num_attention_heads: 20,
  first_k_dense_replace: 1,
  n_routed_experts: 64,
  n_shared_experts: 1,
  num_experts_per_tok: 4,
  n_group: 1,
  topk_group: 1,
  routed_scaling_factor: 1.8,
  q_lora_rank: 768,
  kv_lora_rank: 512,
  qk_nope_head_dim: 192,
  qk_rope_head_dim: 64,
  v_head_dim: 256,
  max_position_embeddings: 202752,
  rope_theta: 1000000,
  rms_norm_eps: 1e-5,
  num_nextn_predict_layers: 1,
  bos_token_id: null,
  eos_token_id: [154820, 154827, 154829],
}

/** Youtu-LLM-2B: latent attention with dense layers. */
const youtu: LatentConfigInput = {
  model_type: 'youtu',
  vocab_size: 128256,
  hidden_size: 2048,
  intermediate_size: 6144,
  num_hidden_layers: 32,
  num_attention_heads: 16,
  q_lora_rank: 1536,
  kv_lora_rank: 512,
  qk_nope_head_dim: 128,
  qk_rope_head_dim: 64,
  v_head_dim: 128,
  max_position_embeddings: 131072,
  rope_theta: 1600000,
  rms_norm_eps: 1e-6,
  tie_word_embeddings: true,
  bos_token_id: 128000,
  eos_token_id: 128001,
}

/** Mistral Small 4: 119B-A6.5B, the text model. */
const mistralSmall4: LatentConfigInput = {
  model_type: 'mistral4',
  vocab_size: 131072,
  hidden_size: 4096,
  intermediate_size: 12288,
  moe_intermediate_size: 2048,
  num_hidden_layers: 36,
  num_attention_heads: 32,
  first_k_dense_replace: 0,
  n_routed_experts: 128,
  n_shared_experts: 1,
  num_experts_per_tok: 4,
  q_lora_rank: 1024,
  kv_lora_rank: 256,
  qk_nope_head_dim: 64,
  qk_rope_head_dim: 64,
  v_head_dim: 128,
  max_position_embeddings: 1048576,
  rope_theta: 10000,
  rope_scaling: {
    type: 'yarn',
    factor: 128,
    original_max_position_embeddings: 8192,
    beta_fast: 32,
    beta_slow: 1,
    mscale: 1,
    mscale_all_dim: 1,
    llama_4_scaling_beta: 0.1,
  },
  rms_norm_eps: 1e-6,
  bos_token_id: 1,
  eos_token_id: 2,
}

/** DeepSeek LLM 7B: a dense model with the attention of Llama. */
const llm7b: DenseConfigInput = {
  model_type: 'llama',
  vocab_size: 102400,
  hidden_size: 4096,
  intermediate_size: 11008,
  num_hidden_layers: 30,
  num_attention_heads: 32,
  num_key_value_heads: 32,
  max_position_embeddings: 4096,
  rope_theta: 10000,
  rms_norm_eps: 1e-6,
  bos_token_id: 100000,
  eos_token_id: 100001,
}

const llm67b: DenseConfigInput = {
  ...llm7b,
  hidden_size: 8192,
  intermediate_size: 22016,
  num_hidden_layers: 95,
  num_attention_heads: 64,
  num_key_value_heads: 8,
}

/** Small models have their own tokenizers, so their start and end tokens are not known here. */
const ownVocabulary = { bos_token_id: null, eos_token_id: null }

/** The 12.5M-parameter model of the training benchmark. */
const small: LatentConfigInput = {
  ...v3,
  ...ownVocabulary,
  vocab_size: 4096,
  hidden_size: 256,
  intermediate_size: 1024,
  moe_intermediate_size: 128,
  num_hidden_layers: 6,
  num_attention_heads: 8,
  first_k_dense_replace: 1,
  n_routed_experts: 16,
  n_shared_experts: 1,
  num_experts_per_tok: 4,
  n_group: 4,
  topk_group: 2,
  q_lora_rank: 128,
  kv_lora_rank: 64,
  qk_nope_head_dim: 32,
  qk_rope_head_dim: 16,
  v_head_dim: 32,
  max_position_embeddings: 512,
  rope_scaling: null,
  num_nextn_predict_layers: 0,
}

/** The 197M-parameter model of the decoding benchmark. */
const medium: LatentConfigInput = {
  ...small,
  vocab_size: 8192,
  hidden_size: 512,
  intermediate_size: 2048,
  moe_intermediate_size: 256,
  num_hidden_layers: 8,
  n_routed_experts: 64,
  num_experts_per_tok: 6,
  n_group: 8,
  topk_group: 4,
  q_lora_rank: 256,
  kv_lora_rank: 128,
  qk_nope_head_dim: 64,
  qk_rope_head_dim: 32,
  v_head_dim: 64,
  max_position_embeddings: 4096,
}

/** The 1.08B-parameter model of the GPU benchmarks: heads of DeepSeek-V3's sizes, 64 experts. */
const large: LatentConfigInput = {
  ...v3,
  ...ownVocabulary,
  vocab_size: 32768,
  hidden_size: 1024,
  intermediate_size: 4096,
  moe_intermediate_size: 512,
  num_hidden_layers: 10,
  num_attention_heads: 16,
  first_k_dense_replace: 1,
  n_routed_experts: 64,
  num_experts_per_tok: 6,
  q_lora_rank: 768,
  max_position_embeddings: 4096,
  rope_scaling: null,
  num_nextn_predict_layers: 0,
}

/** The model of the quickstart: MLA, grouped experts with aux-free balancing, and one MTP module. Trains in minutes on two cores. */
const tiny: LatentConfigInput = {
  ...small,
  hidden_size: 192,
  intermediate_size: 768,
  moe_intermediate_size: 96,
  num_hidden_layers: 4,
  num_attention_heads: 6,
  q_lora_rank: 96,
  num_nextn_predict_layers: 1,
}

/** Named configurations. To change one, spread it: `{ ...presets.tiny, vocab_size: 8192 }`. */
export const presets = {
  'deepseek-v3': v3,
  'deepseek-v3.2': v32,
  'deepseek-v2': v2,
  'deepseek-v2-lite': v2Lite,
  'moonlight-16b-a3b': moonlight,
  'glm-4.7-flash': glmFlash,
  'youtu-llm-2b': youtu,
  'mistral-small-4': mistralSmall4,
  'deepseek-llm-7b': llm7b,
  'deepseek-llm-67b': llm67b,
  '1b': large,
  '200m': medium,
  '12m': small,
  tiny,
} as const satisfies Record<string, DeepSeekConfigInput>
