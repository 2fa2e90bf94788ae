/** @file For tests: a configuration that runs in milliseconds. */
import { namedParameters, tensor } from '@moe/core'
import { type DeepSeek, type DeepSeekConfigInput, presets } from './index.ts'

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

/** Changes weights so that predictions of the model and its MTP modules depend mainly on the last token. As after training, some drafts are then accepted and some are not. */
export function makeDraftsAgree(model: DeepSeek): void {
  const { hidden_size: size } = model.config
  const first = Array.from({ length: 2 * size * size }, (_, i) =>
    i % (2 * size) === Math.floor(i / (2 * size)) ? 1 : 0,
  )
  for (const { name, parameter } of namedParameters(model)) {
    if (/o_proj|down_proj/.test(name)) parameter.assign(model.infer(() => parameter.mul(0.05)))
    if (name === 'lm_head.weight') parameter.assign(model.infer(() => parameter.mul(2)))
    if (name.includes('eh_proj'))
      parameter.assign(model.infer(() => tensor(first, [size, 2 * size], { backend: model.backend })))
  }
}
