/** @file The number of bytes that decoding a token reads. */
import { namedParameters, QuantizedParameter, weightBytes } from '@moe/core'
import type { DeepSeek } from '@moe/deepseek'

/** Bytes of weights that a token reads: the chosen experts of each layer, one row of the embedding, and all other weights. */
export function bytesPerToken(model: DeepSeek): number {
  const { num_experts_per_tok: chosen, n_routed_experts: experts } = model.config
  let bytes = 0
  for (const { name, parameter, slices } of namedParameters(model)) {
    if (name.startsWith('model.embed_tokens') && model.lm_head.weight !== parameter) continue
    const { bytes: all, elements } = weightBytes(parameter)
    // Decoding uses a copy of kv_b_proj split by head, in bf16 if the weights are quantized.
    if (name.includes('kv_b_proj')) bytes += elements * (parameter instanceof QuantizedParameter ? 2 : 4)
    else bytes += slices === undefined ? all : (all * (chosen as number)) / (experts as number)
  }
  return bytes
}
