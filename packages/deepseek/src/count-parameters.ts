/** @file Counts parameters from a configuration. */
import { MoeError } from '@moe/core'
import type { DeepSeekConfig } from './config.ts'

/** Number of parameters by part of the model. */
export interface ParameterCount {
  /** The main model: embedding, layers, final norm and head. Includes balance biases, as in published tables. */
  readonly total: number
  /** Parameters used per token, including embedding and head. */
  readonly active: number
  /** Parameters used per token without the embedding, which is a lookup without multiplications. */
  readonly activeWithoutEmbedding: number
  /** One attention layer, including its indexer. */
  readonly attention: number
  /** The indexer of one layer (0 without sparse attention). */
  readonly indexer: number
  /** One MoE layer: experts, shared experts, gate and bias (0 without experts). */
  readonly moe: number
  /** One dense feed-forward network. */
  readonly dense: number
  /** All MTP modules, without shared embeddings and heads. */
  readonly mtp: number
}

/**
 * Counts the parameters of a model exactly, without creating it.
 * @throws MoeError E_CONFIG for a configuration without defaults filled in
 */
export function countParameters(config: DeepSeekConfig): ParameterCount {
  if (config?.num_key_value_heads === undefined) {
    const problem = 'the configuration lacks defaults'
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'countParameters',
      problem,
      fix: 'pass parseConfig(config), or model.config',
    })
  }
  const { hidden_size: hidden, num_attention_heads: heads, kv_lora_rank: rank, qk_rope_head_dim: rope } = config
  const perHead = config.qk_nope_head_dim + rope
  const queries =
    config.q_lora_rank === null ? hidden * heads * perHead : config.q_lora_rank * (hidden + 1 + heads * perHead)
  const keysValues = hidden * (rank + rope) + rank + rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
  const out = heads * config.v_head_dim * hidden
  const indexer = indexerParameters(config)
  const attention =
    config.model_type === 'llama'
      ? 2 * out + 2 * hidden * config.num_key_value_heads * config.v_head_dim
      : queries + keysValues + out + indexer
  const expert = 3 * hidden * config.moe_intermediate_size
  const experts = config.n_routed_experts ?? 0
  const bias = config.topk_method === 'noaux_tc' ? experts : 0
  const moe = experts === 0 ? 0 : expert * (experts + config.n_shared_experts) + experts * hidden + bias
  const dense = 3 * hidden * config.intermediate_size
  const idle = experts === 0 ? 0 : expert * (experts - (config.num_experts_per_tok ?? 0))
  const embedding = config.vocab_size * hidden

  const layers = config.num_hidden_layers
  const modules = config.num_nextn_predict_layers
  const withExperts = (count: number) => (experts === 0 ? 0 : Math.max(0, count - config.first_k_dense_replace))
  const moeLayers = withExperts(layers)
  const moeModules = withExperts(layers + modules) - moeLayers
  const shared = config.indexer_types?.filter(type => type === 'shared').length ?? 0
  const inAttention = layers * attention - shared * indexer
  const inLayers = inAttention + layers * 2 * hidden + moeLayers * moe + (layers - moeLayers) * dense
  const active = hidden + embedding * 2 + inLayers - moeLayers * idle
  const separate = config.mtp_separate_embeddings ? 2 * embedding : 0
  const mtpLayer = attention + 2 * hidden + 2 * hidden * hidden + 3 * hidden + separate
  return {
    total: hidden + embedding * (config.tie_word_embeddings ? 1 : 2) + inLayers,
    active,
    activeWithoutEmbedding: active - embedding,
    attention,
    indexer,
    moe,
    dense,
    mtp: modules * mtpLayer + moeModules * moe + (modules - moeModules) * dense,
  }
}

function indexerParameters(config: DeepSeekConfig): number {
  const { index_n_heads: heads, index_head_dim: features, q_lora_rank: rank, hidden_size: hidden } = config
  if (config.index_topk === null || heads === null || features === null || rank === null) return 0
  return heads * features * rank + hidden * (features + heads) + 2 * features
}
