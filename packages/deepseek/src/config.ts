/** @file Model configurations with the keys of Hugging Face's config.json, for DeepSeek V3 and related models, and their validation. */
import type { RopeScaling } from '@moe/attention-mla'
import { checkShared, MoeError, shown } from '@moe/core'
import { z } from 'zod'
import { indexerTypeProblems, indexerTypes, patternOf } from './indexer-types.ts'
import {
  aliases,
  type Json,
  type ModelTypeName,
  modelTypeOf,
  modelTypes,
  sharingTypes,
  sparseTypes,
  textConfig,
  toV3Keys,
  unreadable,
} from './model-types.ts'
import { groupsIn, isObject, ropeFields, ropeKeys, ropeProblems, yarn } from './rope-settings.ts'

const size = z.int().positive()
const optionalSize = size.nullish().transform(value => value ?? null)

/** Fields of all architectures. */
const common = {
  /** Number of token ids: rows of the embedding table and the output head. */
  vocab_size: size,
  /** Size of the hidden states. */
  hidden_size: size,
  /** Inner size of dense feed-forward networks. */
  intermediate_size: size,
  /** Number of decoder layers, without MTP modules. */
  num_hidden_layers: size.max(10_000, 'at most 10000 layers are supported'),
  /** Number of query heads. */
  num_attention_heads: size,
  /** Maximum context length in tokens. Default 4096. */
  max_position_embeddings: size.default(4096),
  /** RoPE base. Default 10000. */
  rope_theta: z.number().positive().optional(),
  /** YaRN settings, as in V3's config.json. Default null: no context extension. */
  rope_scaling: ropeFields.nullish(),
  /** The same as transformers 5 writes it, including `rope_theta`. */
  rope_parameters: ropeFields.nullish(),
  /** Share of the rotary features that are rotated; always 1. */
  partial_rotary_factor: z.literal(1).nullish(),
  /** Epsilon of the norms outside of attention. Default 1e-6. */
  rms_norm_eps: z.number().positive().default(1e-6),
  /** Standard deviation of the random initial weights. Default 0.02. */
  initializer_range: z.number().positive().default(0.02),
  /** Standard deviation of the initial embedding. Default initializer_range. */
  embedding_initializer_range: z.number().positive().optional(),
  /** Whether the output head shares the weights of the embedding. Default false. */
  tie_word_embeddings: z.boolean().default(false),
  /** Id of the token that starts a text. Not used by the model; the tokenizer adds it. */
  bos_token_id: z.int().nonnegative().nullish(),
  /** Ids of the tokens that end a text in `generate`. Default: none. */
  eos_token_id: z.union([z.int().nonnegative(), z.array(z.int().nonnegative())]).nullish(),
  /** Activation function; always `silu`. */
  hidden_act: z.literal('silu').default('silu'),
  /** Whether attention projections have biases; always false. */
  attention_bias: z.literal(false).default(false),
}

/** DeepSeek LLM (7B, 67B): dense layers and the multi-head attention of Llama. */
const denseFields = z.object({
  /** `llama`: a dense model. */
  model_type: z.literal('llama'),
  ...common,
  /** Number of key and value heads (grouped-query attention). Default num_attention_heads. */
  num_key_value_heads: optionalSize,
  /** Size of a head. Default hidden_size / num_attention_heads. */
  head_dim: optionalSize,
  /** Whether feed-forward networks have biases; always false. */
  mlp_bias: z.literal(false).default(false),
})

const latentFields = z.object({
  /** Architecture. Default `deepseek_v3`. `kimi_k2` is the same as `deepseek_v3`. */
  model_type: z
    .enum([
      'deepseek_v3',
      'deepseek_v32',
      'deepseek_v2',
      'glm4_moe_lite',
      'glm_moe_dsa',
      'youtu',
      'mistral4',
      'kimi_k2',
    ])
    .default('deepseek_v3')
    .transform(type => (type === 'kimi_k2' ? aliases[type] : type)),
  ...common,
  /** Inner size of each expert. */
  moe_intermediate_size: z.int().nonnegative().default(0),
  /** Number of leading layers with a dense feed-forward network instead of experts. Default 0. */
  first_k_dense_replace: z.int().nonnegative().default(0),
  /** The same in GLM's config.json: that many times `dense`, then `sparse`. */
  mlp_layer_types: z.array(z.string()).nullish(),
  /** Number of routed experts. Null or undefined: all layers are dense. */
  n_routed_experts: optionalSize,
  /** Number of shared experts, which process every token, as one network of that many times the size. Default 0. */
  n_shared_experts: z
    .int()
    .nonnegative()
    .nullish()
    .transform(value => value ?? 0),
  /** Number of routed experts per token. */
  num_experts_per_tok: optionalSize,
  /** Number of groups of experts (nodes) in group-limited routing. Default 1. */
  n_group: optionalSize,
  /** Number of groups that a token may use. Default: all. */
  topk_group: optionalSize,
  /**
   * How experts are selected. `noaux_tc`: V3, with a balance bias; a group's score is the sum of its two best experts. `group_limited_greedy`: V2; a group's score is that of its best expert. `greedy`: without groups. Default
   * noaux_tc in V3, greedy in V2.
   */
  topk_method: z.enum(['noaux_tc', 'group_limited_greedy', 'greedy']).default('noaux_tc'),
  /** Function from router logits to affinities. Default sigmoid with noaux_tc, softmax otherwise. */
  scoring_func: z.enum(['sigmoid', 'softmax']).optional(),
  /** Whether gate values are normalized to sum 1. Default true in V3; false in V2, whose readers disagree about true. */
  norm_topk_prob: z.boolean().default(true),
  /** Factor of the gate values, applied last. Default 1. */
  routed_scaling_factor: z.number().positive().default(1),
  /** Rank of the query compression. Null or undefined: queries are projected directly (V2-Lite). */
  q_lora_rank: optionalSize,
  /** Rank of the joint key/value compression. The cache stores this many numbers per token and layer, plus the rotary key. */
  kv_lora_rank: size,
  /** Size of the part of queries and keys without rotary embedding, per head. */
  qk_nope_head_dim: size,
  /** Size of the part of queries with rotary embedding, per head, and of the rotary key, which all heads share. Even. */
  qk_rope_head_dim: size,
  /** Size of the values, per head. */
  v_head_dim: size,
  /** Whether RoPE rotates adjacent features (released layout) instead of halves. Default true. */
  rope_interleave: z.boolean().default(true),
  /** Number of keys that a query attends to in sparse attention (V3.2), selected by an indexer in each layer. Null or undefined: all, without an indexer. */
  index_topk: optionalSize,
  /** Number of heads of the indexers. */
  index_n_heads: optionalSize,
  /** Size of the queries and keys of the indexers, of which the first qk_rope_head_dim have rotary embedding. */
  index_head_dim: optionalSize,
  /** Whether the RoPE of indexers rotates adjacent features, as in GLM, instead of halves. Default false. */
  indexer_rope_interleave: z.boolean().default(false),
  /**
   * For each layer, `full` if it has an indexer, or `shared` if it attends to the keys that the nearest indexer before it has selected (GLM-5.2). MTP modules have indexers. Default: index_topk_pattern, or else
   * index_topk_freq and index_skip_topk_offset.
   */
  indexer_types: z.array(z.enum(['full', 'shared'])).nullish(),
  /** The same as one letter per layer, F or S. */
  index_topk_pattern: z
    .string()
    .regex(/^[FS]*$/)
    .nullish(),
  /** The same as a number of layers per indexer. Default 1: every layer has an indexer. */
  index_topk_freq: size.nullish(),
  /** Number of leading layers that all have indexers, the last of which begins the schedule of index_topk_freq. Default 2. */
  index_skip_topk_offset: z.int().nonnegative().nullish(),
  /** Number of MTP modules, which follow the last layer. Default 0. */
  num_nextn_predict_layers: z.int().nonnegative().default(0),
  /** Whether MTP modules have their own embeddings and heads. Not a key of the released models, whose readers always share them. */
  mtp_separate_embeddings: z.boolean().default(false),
  /** Every layer after the dense ones has experts; always 1. */
  moe_layer_freq: z.literal(1).default(1),
})

/** Configuration of a model with latent attention, before defaults are filled in. @interface */
export type LatentConfigInput = z.input<typeof latentFields>
/** Configuration of DeepSeek LLM, before defaults are filled in. @interface */
export type DenseConfigInput = z.input<typeof denseFields>
/** A configuration as users write it: the content of config.json, or a preset with changes. */
export type DeepSeekConfigInput = LatentConfigInput | DenseConfigInput

/**
 * A validated configuration with all defaults filled in. A dense one (model_type `llama`) has no latents and no experts: kv_lora_rank, qk_nope_head_dim and moe_intermediate_size are 0, and both
 * qk_rope_head_dim and v_head_dim are the size of a head.
 */
export interface DeepSeekConfig
  extends Omit<
    Fields,
    | 'model_type'
    | 'rope_scaling'
    | 'rope_parameters'
    | 'rope_theta'
    | 'partial_rotary_factor'
    | 'mlp_layer_types'
    | 'indexer_types'
    | 'index_topk_freq'
    | 'index_topk_pattern'
    | 'index_skip_topk_offset'
  > {
  /** The `model_type` under which the model is saved. For Kimi K2 it is `deepseek_v3`. */
  readonly model_type: ModelTypeName
  /** Number of key and value heads; with latent attention, num_attention_heads. */
  readonly num_key_value_heads: number
  /** RoPE base. Default 10000. */
  readonly rope_theta: number
  /** YaRN settings with the original context length, or null. */
  readonly rope_scaling: RopeScaling | null
  /** Function from router logits to affinities. Default sigmoid with noaux_tc, softmax otherwise. */
  readonly scoring_func: 'sigmoid' | 'softmax'
  /** For each layer, whether it has an indexer (`full`) or shares that of an earlier layer (`shared`). Undefined if none is shared. */
  readonly indexer_types?: Array<'full' | 'shared'>
}

/**
 * Validates a configuration and fills in defaults. For a multimodal model, `text_config` is used.
 * @throws MoeError E_CONFIG with all problems in one message, or, for an unsupported model_type, with the supported ones
 */
export function parseConfig(input: unknown): DeepSeekConfig {
  if (!isObject(input)) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'DeepSeek',
      problem: `the configuration is ${shown(input)}, not an object`,
      fix: 'pass the content of a config.json, or one of the presets, such as presets.tiny',
    })
  }
  const given = textConfig(input as Json)
  const type = modelTypeOf(given)
  const dense = type === 'llama'
  checkShared('DeepSeek', given, fieldsOf(type))
  const json = toV3Keys(type, given)
  for (const key of ropeKeys) {
    const scaling = json[key]
    if (isObject(scaling)) checkShared(`DeepSeek ${key}`, scaling, ropeFields.shape)
  }
  const result = dense
    ? denseFields.transform(withoutLatents).safeParse(json)
    : latentFields.transform(withLatents).safeParse(json)
  const problems = result.success
    ? [...crossChecks(result.data), ...unreadable(type, result.data), ...ropeProblems(json, result.data)]
    : result.error.issues.map(issue => `${issue.path.join('.') || 'config'}: ${issue.message}`)
  if (!result.success || problems.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'DeepSeek',
      problem: `the configuration has ${problems.length} ${problems.length === 1 ? 'problem' : 'problems'}:\n${problems.map(problem => `  - ${problem}`).join('\n')}\n`,
      fix: 'fix them, or start from one of the presets',
      details: { problems },
    })
  }
  const { rope_parameters, rope_scaling, partial_rotary_factor, mlp_layer_types, ...others } = result.data
  const { indexer_types, index_topk_freq, index_topk_pattern, index_skip_topk_offset, ...rest } = others
  const { topk_method, scoring_func, rope_theta } = rest
  const types = indexerTypes(result.data)
  return {
    ...rest,
    ...(types && { indexer_types: types }),
    scoring_func: scoring_func ?? (topk_method === 'noaux_tc' ? 'sigmoid' : 'softmax'),
    rope_theta: rope_theta ?? rope_scaling?.rope_theta ?? rope_parameters?.rope_theta ?? 10000,
    rope_scaling: yarn(rope_scaling ?? rope_parameters, rest.max_position_embeddings),
  }
}

/** Applies changes to a configuration. A new rope_scaling, or rope_parameters, extends the existing context length. */
export function changedConfig(
  config: DeepSeekConfigInput,
  { rope_parameters, ...changes }: Partial<LatentConfigInput> | Partial<DenseConfigInput>,
): DeepSeekConfigInput {
  const { rope_parameters: _, ...others } = config
  const { rope_theta, rope_scaling, max_position_embeddings } = parseConfig(config)
  const original = rope_scaling?.original_max_position_embeddings ?? max_position_embeddings
  const { llama_4_scaling_beta } = rope_scaling ?? {}
  const kept = { original_max_position_embeddings: original, ...(llama_4_scaling_beta && { llama_4_scaling_beta }) }
  const scaling = changes.rope_scaling ?? rope_parameters
  const changed = { ...others, rope_theta: scaling?.rope_theta ?? rope_theta, rope_scaling, ...changes }
  return { ...changed, ...(scaling && { rope_scaling: { ...kept, ...scaling } }) } as DeepSeekConfigInput
}

/** Returns the fields of a config.json that this package uses. Files also contain those of other programs. */
export function ownKeys(json: Json): Json {
  const text = textConfig(json)
  const own = pick(text, fieldsOf(modelTypeOf(text)))
  for (const scaling of ropeKeys) {
    const given = own[scaling]
    // Keep settings of single layer kinds, so that validation rejects them.
    if (isObject(given)) own[scaling] = { ...pick(given, ropeFields.shape), ...groupsIn(given) }
  }
  return own
}

const fieldsOf = (type: ModelTypeName) => (type === 'llama' ? denseFields.shape : latentFields.shape)

const pick = (given: object, names: object): Record<string, unknown> =>
  Object.fromEntries(Object.entries(given).filter(([name]) => Object.hasOwn(names, name)))

type Fields = z.output<typeof latentFields>
type CheckedFields = ReturnType<typeof withLatents>

const withLatents = (config: Fields) => ({
  ...config,
  model_type: config.model_type as DeepSeekConfig['model_type'],
  num_key_value_heads: config.num_attention_heads,
})

/** Converts a dense configuration to the fields of the others. */
function withoutLatents({
  head_dim,
  num_key_value_heads,
  mlp_bias,
  ...config
}: z.output<typeof denseFields>): CheckedFields {
  const { num_attention_heads: heads, hidden_size: hidden } = config
  const features = head_dim ?? hidden / heads
  return {
    ...config,
    model_type: config.model_type as DeepSeekConfig['model_type'],
    num_key_value_heads: num_key_value_heads ?? heads,
    qk_rope_head_dim: features,
    v_head_dim: features,
    qk_nope_head_dim: 0,
    kv_lora_rank: 0,
    q_lora_rank: null,
    rope_interleave: false,
    moe_intermediate_size: 0,
    first_k_dense_replace: 0,
    n_routed_experts: null,
    n_shared_experts: 0,
    num_experts_per_tok: null,
    n_group: null,
    topk_group: null,
    topk_method: 'greedy',
    norm_topk_prob: false,
    routed_scaling_factor: 1,
    index_topk: null,
    index_n_heads: null,
    index_head_dim: null,
    indexer_rope_interleave: false,
    num_nextn_predict_layers: 0,
    mtp_separate_embeddings: false,
    moe_layer_freq: 1,
  }
}

/** Problems that involve several fields. */
function crossChecks(config: CheckedFields): string[] {
  const problems: string[] = []
  const add = (wrong: boolean, problem: string) => {
    if (wrong) problems.push(problem)
  }
  const { n_routed_experts: experts, num_experts_per_tok: topK, n_group: groups, topk_group: topGroups } = config
  const { num_attention_heads: heads, num_key_value_heads: keyHeads, qk_rope_head_dim: rotary } = config
  if (config.model_type === 'llama') {
    add(!Number.isInteger(rotary), `num_attention_heads = ${heads} does not divide hidden_size = ${config.hidden_size}`)
    add(heads % keyHeads !== 0, `num_key_value_heads = ${keyHeads} does not divide num_attention_heads = ${heads}`)
    add(rotary % 2 === 1, `head_dim = ${rotary} is odd`)
  } else add(rotary % 2 !== 0, `qk_rope_head_dim = ${rotary} is odd`)
  if (experts === null) add(topK !== null, 'num_experts_per_tok is set, but n_routed_experts is missing')
  else {
    add(topK === null, 'num_experts_per_tok is missing')
    add(config.moe_intermediate_size === 0, 'moe_intermediate_size is missing')
    add(topK !== null && topK > experts, `num_experts_per_tok = ${topK} exceeds n_routed_experts = ${experts}`)
    add(groups !== null && experts % groups !== 0, `n_group = ${groups} does not divide n_routed_experts = ${experts}`)
    add(
      groups !== null && topGroups !== null && topGroups > groups,
      `topk_group = ${topGroups} exceeds n_group = ${groups}`,
    )
    const kept = groups !== null && topGroups !== null ? Math.floor(experts / groups) * topGroups : experts
    add(
      topK !== null && topK <= experts && topK > kept,
      `num_experts_per_tok = ${topK} exceeds the ${kept} experts of the kept groups`,
    )
    // DeepSeek's code then omits routed_scaling_factor, transformers does not normalize, and vLLM and llama.cpp do both.
    add(
      config.model_type === 'deepseek_v2' && config.topk_method !== 'noaux_tc' && config.norm_topk_prob,
      `norm_topk_prob = true with topk_method = ${config.topk_method}, of which other readers of deepseek_v2 compute different gates`,
    )
  }
  const { index_topk, index_head_dim, q_lora_rank, model_type } = config
  const { isSparse = false, sharesIndexers = false } = modelTypes[model_type]
  add(index_topk !== null && !isSparse, `index_topk = ${index_topk}, but only ${sparseTypes} have sparse attention`)
  if (isSparse) {
    add(q_lora_rank === null, 'q_lora_rank is missing: the indexers read compressed queries')
    const tooSmall = index_head_dim !== null && index_head_dim < rotary
    problems.push(...indexerTypeProblems(config))
    add(tooSmall, `index_head_dim = ${index_head_dim} is less than qk_rope_head_dim = ${rotary}`)
  }
  const isShared = indexerTypes(config) !== null
  add(isShared && !sharesIndexers, `some layers have no indexer, but only ${sharingTypes} has such layers`)
  add(
    config.bos_token_id != null && config.bos_token_id >= config.vocab_size,
    `bos_token_id = ${config.bos_token_id} is outside the vocabulary of ${config.vocab_size}`,
  )
  return problems
}

/** Whether layer i has experts. */
export const isMoELayer = (config: DeepSeekConfig, layer: number): boolean =>
  config.n_routed_experts !== null && layer >= config.first_k_dense_replace

/** Whether layer i has sparse attention to the keys that an earlier layer has selected. */
export const sharesIndexer = (config: DeepSeekConfig, layer: number): boolean =>
  config.indexer_types?.[layer] === 'shared'

/** Ids of the tokens that end a text. */
export function endTokens(config: DeepSeekConfig): number[] {
  const { eos_token_id: eos } = config
  return eos == null ? [] : Array.isArray(eos) ? eos : [eos]
}

/** Returns the content of config.json for a configuration: the keys that transformers, vLLM and others expect, without null where they expect numbers. */
export function hfConfig(config: DeepSeekConfig): Record<string, unknown> {
  return config.model_type === 'llama' ? denseHfConfig(config) : latentHfConfig(config)
}

function denseHfConfig(config: DeepSeekConfig): Record<string, unknown> {
  const keys = Object.keys(denseFields.shape).filter(key => key in config)
  return {
    architectures: [modelTypes.llama.architecture],
    ...Object.fromEntries(keys.map(key => [key, config[key as keyof DeepSeekConfig]])),
    head_dim: config.v_head_dim,
    mlp_bias: false,
    torch_dtype: 'float32',
  }
}

function latentHfConfig(config: DeepSeekConfig): Record<string, unknown> {
  const { n_routed_experts, num_experts_per_tok, n_group, topk_group, first_k_dense_replace, ...others } = config
  const { mtp_separate_embeddings, ...most } = others
  const { index_topk, index_n_heads, index_head_dim, indexer_rope_interleave, indexer_types, ...rest } = most
  const { architecture, write } = modelTypes[config.model_type]
  const indexer = index_topk === null ? {} : { index_topk, index_n_heads, index_head_dim, indexer_rope_interleave }
  const sharing = indexer_types && { indexer_types, index_topk_pattern: patternOf(indexer_types) }
  const experts =
    n_routed_experts === null
      ? { first_k_dense_replace: config.num_hidden_layers }
      : {
          first_k_dense_replace,
          n_routed_experts,
          num_experts_per_tok,
          n_group: n_group ?? 1,
          topk_group: topk_group ?? n_group ?? 1,
        }
  const written = {
    architectures: [architecture],
    ...rest,
    ...experts,
    ...indexer,
    ...sharing,
    ...(mtp_separate_embeddings ? { mtp_separate_embeddings } : {}),
    num_key_value_heads: config.num_attention_heads,
    torch_dtype: 'float32',
    ...write?.(config),
  }
  return Object.fromEntries(Object.entries(written).filter(([, value]) => value !== undefined))
}

/** Keys that transformers requires to be floats: it accepts 1.0, but not 1. */
const floatKeys =
  'routed_scaling_factor|rms_norm_eps|initializer_range|embedding_initializer_range|rope_theta|factor|beta_fast|beta_slow|mscale|mscale_all_dim|llama_4_scaling_beta|partial_rotary_factor'

/** Returns the text of config.json. */
export function configJson(config: DeepSeekConfig): string {
  const text = JSON.stringify(hfConfig(config), null, 2)
  return `${text.replace(new RegExp(`("(?:${floatKeys})": -?\\d+)(?=,?$)`, 'gm'), '$1.0')}\n`
}
