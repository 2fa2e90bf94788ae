/** @file What an MLA layer is made of, in the terms of Hugging Face's config.json. */
import { checkShared, MoeError, type OptionNames, shown } from '@moe/core'

/** YaRN context extension (Peng et al. 2023) as DeepSeek configures it. */
export interface RopeScaling {
  /** The one method that is known. */
  readonly type: 'yarn'
  /** How many times longer the context becomes. */
  readonly factor: number
  /** Context length before the extension. */
  readonly original_max_position_embeddings: number
  /** Turns over the original context from which a pair keeps its speed. Default 32. */
  readonly beta_fast?: number
  /** Turns below which a pair is slowed down by the whole factor. Default 1. */
  readonly beta_slow?: number
  /** Of the factor on cos and sin; see `rotaryAmplitude`. */
  readonly mscale?: number
  /** Of the factor on the softmax scale; see `softmaxScale`. 0 or undefined: none. */
  readonly mscale_all_dim?: number
}

/** Sizes of an MLA layer. They are those of Hugging Face's config.json, from which it may be taken as it is. */
export interface MlaConfig {
  /** Features of a token outside of attention. */
  readonly hidden_size: number
  /** Heads of queries, and of the expanded keys and values. */
  readonly num_attention_heads: number
  /** Rank of the query compression; null projects queries directly (V2-Lite). */
  readonly q_lora_rank: number | null
  /** Rank of the joint key/value compression: what the cache holds per token, beside the rope key. */
  readonly kv_lora_rank: number
  /** Features of a query and a key in each head that are not rotated. */
  readonly qk_nope_head_dim: number
  /** Features of a query in each head, and of the key that all heads share, that are rotated. Even. */
  readonly qk_rope_head_dim: number
  /** Features of a value in each head. */
  readonly v_head_dim: number
  /** Base of the rotation's wavelengths. Default 10000. */
  readonly rope_theta?: number
  /** Default null: no extension. */
  readonly rope_scaling?: RopeScaling | null
  /** Rotates adjacent features (released layout, default) instead of halves. */
  readonly rope_interleave?: boolean
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
}

const scalingNames: OptionNames<RopeScaling> = {
  type: true,
  factor: true,
  original_max_position_embeddings: true,
  beta_fast: true,
  beta_slow: true,
  mscale: true,
  mscale_all_dim: true,
}

/** What is wrong with the numbers that rotation tables are made of. */
export function ropeProblems({
  rope_theta: theta = 10000,
  rope_scaling: scaling,
}: Pick<MlaConfig, 'rope_theta' | 'rope_scaling'>): string[] {
  const problems: string[] = []
  if (!(theta > 0 && theta < Infinity)) problems.push(`rope_theta = ${theta} is not a positive number`)
  if (!scaling) return problems
  checkShared('rope_scaling', scaling, scalingNames)
  const { type, factor, original_max_position_embeddings: context } = scaling
  if (type !== 'yarn') problems.push(`rope_scaling.type = ${JSON.stringify(type)} is not "yarn"; null is no scaling`)
  if (!(factor > 0 && factor < Infinity)) problems.push(`rope_scaling.factor = ${factor} is not a positive number`)
  if (!(Number.isInteger(context) && context >= 1)) {
    problems.push(`rope_scaling.original_max_position_embeddings = ${context} is not a positive integer`)
  }
  return problems
}

/** @throws MoeError E_CONFIG with every fault in one message. */
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
  problems.push(...ropeProblems(config))
  if (problems.length > 0) {
    throw new MoeError({ code: 'E_CONFIG', op: 'MultiHeadLatentAttention', problem: problems.join('; ') })
  }
}
