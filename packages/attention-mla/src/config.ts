/** @file Configuration of an MLA layer, in the terms of Hugging Face's config.json. */
import { checkShared, MoeError, type OptionNames, shown } from '@moe/core'

/** YaRN context extension (Peng et al. 2023), as DeepSeek configures it. */
export interface RopeScaling {
  /** The only supported method. */
  readonly type: 'yarn'
  /** Factor by which the context is extended. */
  readonly factor: number
  /** Context length before the extension. */
  readonly original_max_position_embeddings: number
  /** Pairs with at least this many rotations over the original context keep their frequency. Default 32. */
  readonly beta_fast?: number
  /** Pairs with fewer rotations than this are slowed down by the full factor. Default 1. */
  readonly beta_slow?: number
  /** Parameter of the factor on cos and sin; see `rotaryAmplitude`. */
  readonly mscale?: number
  /** Parameter of the factor on the softmax scale; see `softmaxScale`. If 0 or undefined, there is none. */
  readonly mscale_all_dim?: number
  /**
   * Queries at position p are multiplied by 1 + beta ln(1 + floor(p / original_max_position_embeddings)), as in
   * Llama 4 and Mistral Small 4. Default 0: not at all.
   */
  readonly llama_4_scaling_beta?: number
}

/** Sizes of an MLA layer. You can pass a complete Hugging Face config.json. */
export interface MlaConfig {
  /** Features of a token outside of attention. */
  readonly hidden_size: number
  /** Number of heads of the queries and of the expanded keys and values. */
  readonly num_attention_heads: number
  /** Rank of the query compression. null projects queries directly (V2-Lite). */
  readonly q_lora_rank: number | null
  /**
   * Rank of the joint key/value compression: the features that the cache stores per token, in addition to the rope key.
   */
  readonly kv_lora_rank: number
  /** Features per head of queries and keys that are not rotated. */
  readonly qk_nope_head_dim: number
  /** Rotated features of each query head, and of the key that all heads share. Must be even. */
  readonly qk_rope_head_dim: number
  /** Features of a value in each head. */
  readonly v_head_dim: number
  /** Base of the rotation wavelengths. Default 10000. */
  readonly rope_theta?: number | undefined
  /** Context extension. Default null: none. */
  readonly rope_scaling?: RopeScaling | null | undefined
  /** Whether to rotate adjacent features, as in the released layout (default), instead of halves. */
  readonly rope_interleave?: boolean | undefined
  /**
   * Number of keys that a query attends to, selected by a lightning indexer (DeepSeek-V3.2). Requires q_lora_rank.
   * Default null: all keys, without an indexer.
   */
  readonly index_topk?: number | null | undefined
  /** Number of heads of the indexer. */
  readonly index_n_heads?: number | null | undefined
  /** Features of the queries and the key of the indexer, of which the first qk_rope_head_dim are rotated. */
  readonly index_head_dim?: number | null | undefined
  /** Whether the indexer rotates adjacent features, as in GLM, instead of halves (default). */
  readonly indexer_rope_interleave?: boolean | undefined
}

export const mlaNames: OptionNames<MlaConfig> = {
  hidden_size: true,
  num_attention_heads: true,
  q_lora_rank: true,
  kv_lora_rank: true,
  qk_nope_head_dim: true,
  qk_rope_head_dim: true,
  v_head_dim: true,
  rope_theta: true,
  rope_scaling: true,
  rope_interleave: true,
  index_topk: true,
  index_n_heads: true,
  index_head_dim: true,
  indexer_rope_interleave: true,
}

const scalingNames: OptionNames<RopeScaling> = {
  type: true,
  factor: true,
  original_max_position_embeddings: true,
  beta_fast: true,
  beta_slow: true,
  mscale: true,
  mscale_all_dim: true,
  llama_4_scaling_beta: true,
}

/** Returns the problems of the settings that determine the rotation tables. */
export function ropeProblems({
  rope_theta: theta = 10000,
  rope_scaling: scaling,
}: Pick<MlaConfig, 'rope_theta' | 'rope_scaling'>): string[] {
  const problems: string[] = []
  if (!(theta > 0 && theta < Infinity)) problems.push(`rope_theta = ${theta} is not a positive number`)
  if (!scaling) return problems
  checkShared('rope_scaling', scaling, scalingNames)
  const { type, factor, original_max_position_embeddings: context, llama_4_scaling_beta: beta = 0 } = scaling
  if (type !== 'yarn')
    problems.push(`rope_scaling.type = ${JSON.stringify(type)} is not "yarn"; use null for no scaling`)
  if (!(factor > 0 && factor < Infinity)) problems.push(`rope_scaling.factor = ${factor} is not a positive number`)
  if (!(Number.isInteger(context) && context >= 1)) {
    problems.push(`rope_scaling.original_max_position_embeddings = ${context} is not a positive integer`)
  }
  for (const key of ['beta_fast', 'beta_slow'] as const) {
    const { [key]: rotations = 1 } = scaling
    if (!(rotations > 0 && rotations < Infinity))
      problems.push(`rope_scaling.${key} = ${rotations} is not a positive number`)
  }
  if (!(beta >= 0 && beta < Infinity)) {
    problems.push(`rope_scaling.llama_4_scaling_beta = ${beta} is neither 0 nor a positive number`)
  }
  return problems
}

/** Returns the problems of the settings of the indexer. */
function indexerProblems(config: MlaConfig): string[] {
  if (config.index_topk == null) return []
  const problems: string[] = []
  for (const key of ['index_topk', 'index_n_heads', 'index_head_dim'] as const) {
    const size = config[key]
    if (!Number.isInteger(size) || Number(size) < 1) problems.push(`${key} = ${shown(size)} is not a positive integer`)
  }
  const { index_head_dim: features, qk_rope_head_dim: ropeDim } = config
  if (features != null && features < ropeDim)
    problems.push(`index_head_dim = ${features} is less than qk_rope_head_dim = ${ropeDim}`)
  if (config.q_lora_rank === null)
    problems.push('index_topk requires q_lora_rank: the indexer reads compressed queries')
  return problems
}

/** Checks the configuration of an MLA layer. @throws MoeError E_CONFIG that lists all problems */
export function checkMlaConfig(config: MlaConfig): void {
  checkShared('MultiHeadLatentAttention', config, mlaNames)
  const problems: string[] = []
  const sizes = [
    'hidden_size',
    'num_attention_heads',
    'kv_lora_rank',
    'qk_nope_head_dim',
    'qk_rope_head_dim',
    'v_head_dim',
  ] as const
  for (const key of sizes) {
    if (!Number.isInteger(config[key]) || config[key] < 1)
      problems.push(`${key} = ${shown(config[key])} is not a positive integer`)
  }
  if (config.q_lora_rank !== null && !(Number.isInteger(config.q_lora_rank) && config.q_lora_rank >= 1)) {
    problems.push(`q_lora_rank = ${shown(config.q_lora_rank)} is neither null nor a positive integer`)
  }
  if (config.qk_rope_head_dim % 2 !== 0) problems.push(`qk_rope_head_dim = ${config.qk_rope_head_dim} is odd`)
  problems.push(...ropeProblems(config), ...indexerProblems(config))
  if (problems.length > 0) {
    throw new MoeError({ code: 'E_CONFIG', op: 'MultiHeadLatentAttention', problem: problems.join('; ') })
  }
}
