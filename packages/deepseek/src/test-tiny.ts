/** @file For tests: a configuration that runs in milliseconds. */
import { type DeepSeekConfigInput, presets } from './index.ts'

export const tiny = {
  ...presets.tiny,
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  moe_intermediate_size: 8,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  q_lora_rank: 12,
  kv_lora_rank: 8,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  initializer_range: 0.3,
  eos_token_id: null,
  bos_token_id: null,
} satisfies DeepSeekConfigInput
