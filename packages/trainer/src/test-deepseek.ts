/** @file For tests: a small DeepSeek and random documents for it. */
import { Random } from '@moe/core'
import { type DeepSeekConfigInput, presets } from '@moe/deepseek'
import { TokenDataset } from './data/token-dataset.ts'

export const smallConfig = {
  ...presets.tiny,
  vocab_size: 40,
  hidden_size: 24,
  intermediate_size: 32,
  moe_intermediate_size: 8,
  num_hidden_layers: 3,
  num_attention_heads: 2,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  q_lora_rank: 12,
  kv_lora_rank: 8,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  initializer_range: 0.3,
  num_nextn_predict_layers: 1,
} satisfies DeepSeekConfigInput

/**
 * Three documents of 60 tokens, 23 windows of 8. With 2 rows per step, the last step of an epoch extends into the next
 * and contains padding.
 */
export function smallData(): TokenDataset {
  const random = new Random(3)
  const document = () => Int32Array.from({ length: 60 }, () => 2 + random.integer(38))
  return TokenDataset.fromTokens(Array.from({ length: 3 }, document))
}
