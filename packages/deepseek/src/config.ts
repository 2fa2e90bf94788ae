/** @file Model configurations in Hugging Face's terms (config.json of DeepSeek V3 and its relatives), checked as a whole. */
import { type RopeScaling, rotaryAmplitude } from '@moe/attention-mla'
import { checkShared, MoeError } from '@moe/core'
import { z } from 'zod'
import {
  aliases,
  inTermsOfV3,
  type Json,
  type ModelTypeName,
  modelTypeOf,
  modelTypes,
  textConfig,
  unreadable,
} from './model-types.ts'

const size = z.int().positive()
const optionalSize = size.nullish().transform(value => value ?? null)

/** Rope settings as V3's config.json has them (`rope_scaling`), and as transformers 5 writes them (`rope_parameters`). */
const ropeFields = z.object({
  type: z.string().optional(),
  rope_type: z.string().optional(),
  rope_theta: z.number().positive().optional(),
  factor: z.number().positive().optional(),
  original_max_position_embeddings: size.optional(),
  beta_fast: z.number().positive().optional(),
  beta_slow: z.number().positive().optional(),
  mscale: z.number().optional(),
  mscale_all_dim: z.number().optional(),
  /** Refused where it is not what the other numbers make of it. */
  attention_factor: z.number().nullish(),
  /** Bounds of the ramp between slow and fast features are rounded. */
  truncate: z.literal(true).nullish(),
  /** No part of the features that are turned is left as it is. */
  partial_rotary_factor: z.literal(1).nullish(),
  /** Queries do not grow with their positions. */
  llama_4_scaling_beta: z.literal(0).nullish(),
})

/** What all architectures have. */
const common = {
  /** Token ids: rows of the embedding table and of the head. */
  vocab_size: size,
  /** Features of a token between layers. */
  hidden_size: size,
  /** Inner features of a dense feed-forward net. */
  intermediate_size: size,
  /** Decoder layers; MTP modules are not counted. */
  num_hidden_layers: size,
  /** Heads of queries. */
  num_attention_heads: size,
  /** Context in tokens that the model is made for. Default 4096. */
  max_position_embeddings: size.default(4096),
  /** Base of the rotation's wavelengths. Default 10000. */
  rope_theta: z.number().positive().optional(),
  /** YaRN, as V3's config.json has it. Default null: no extension of the context. */
  rope_scaling: ropeFields.nullish(),
  /** The same as transformers 5 writes it, with `rope_theta` among it. */
  rope_parameters: ropeFields.nullish(),
  /** No part of the features that are turned is left as it is. */
  partial_rotary_factor: z.literal(1).nullish(),
  /** Epsilon of the norms outside of attention. Default 1e-6. */
  rms_norm_eps: z.number().positive().default(1e-6),
  /** Standard deviation of random weights. Default 0.02. */
  initializer_range: z.number().positive().default(0.02),
  /** The same of the embedding. Default initializer_range. */
  embedding_initializer_range: z.number().positive().optional(),
  /** Whether the head is the embedding table. Default false. */
  tie_word_embeddings: z.boolean().default(false),
  /** Id that begins a text. Kept for those who read the configuration; the tokenizer puts it there. */
  bos_token_id: z.int().nonnegative().nullish(),
  /** Ids that end a text in `generate`. Default: none. */
  eos_token_id: z.union([z.int().nonnegative(), z.array(z.int().nonnegative())]).nullish(),
  /** The one activation that there is. */
  hidden_act: z.literal('silu').default('silu'),
  /** Projections of attention have no biases. */
  attention_bias: z.literal(false).default(false),
}

/** DeepSeek LLM (7B, 67B): the dense layers and multi-head attention of Llama. */
const denseFields = z.object({
  /** Says that it is a dense model. */
  model_type: z.literal('llama'),
  ...common,
  /** Heads of keys and values, each shared by as many query heads. Default num_attention_heads. */
  num_key_value_heads: optionalSize,
  /** Features of a head. Default hidden_size / num_attention_heads. */
  head_dim: optionalSize,
  /** Feed-forward nets have no biases. */
  mlp_bias: z.literal(false).default(false),
})

const latentFields = z.object({
  /** Default `deepseek_v3`. Kimi K2 is V3 under a name of its own. */
  model_type: z
    .enum(['deepseek_v3', 'deepseek_v2', 'glm4_moe_lite', 'youtu', 'kimi_k2'])
    .default('deepseek_v3')
    .transform(type => (type === 'kimi_k2' ? aliases[type] : type)),
  ...common,
  /** Inner features of each expert. */
  moe_intermediate_size: z.int().nonnegative().default(0),
  /** Leading layers with a dense feed-forward net. Default 0. */
  first_k_dense_replace: z.int().nonnegative().default(0),
  /** The same as GLM's config.json may have it: so many times `dense`, then `sparse`. */
  mlp_layer_types: z.array(z.string()).nullish(),
  /** Experts that a gate chooses among. Null or undefined: all layers are dense. */
  n_routed_experts: optionalSize,
  /** Experts that every token goes through, as one net so many times as wide. Default 0. */
  n_shared_experts: z
    .int()
    .nonnegative()
    .nullish()
    .transform(value => value ?? 0),
  /** Experts that each token goes through, of those that a gate chooses among. */
  num_experts_per_tok: optionalSize,
  /** Groups of experts (nodes). Default 1. */
  n_group: optionalSize,
  /** Groups that a token may use. Default all. */
  topk_group: optionalSize,
  /**
   * `noaux_tc`: V3 (bias, groups by their two best). `group_limited_greedy`: V2 (groups by their best). `greedy`: no groups. Default noaux_tc in
   * V3, greedy in V2.
   */
  topk_method: z.enum(['noaux_tc', 'group_limited_greedy', 'greedy']).default('noaux_tc'),
  /** Affinities. Default sigmoid with noaux_tc, softmax otherwise. */
  scoring_func: z.enum(['sigmoid', 'softmax']).optional(),
  /** Whether gates are divided by their sum. Default true in V3, false in V2. */
  norm_topk_prob: z.boolean().default(true),
  /** Factor on the gates, applied last. Default 1. */
  routed_scaling_factor: z.number().positive().default(1),
  /** Rank of the query compression. Null or undefined: queries are projected directly (V2-Lite). */
  q_lora_rank: optionalSize,
  /** Rank of the joint key/value compression: what the cache holds per token and layer, beside the rope key. */
  kv_lora_rank: size,
  /** Features of a query and a key in each head that are not rotated. */
  qk_nope_head_dim: size,
  /** Features of a query in each head, and of the key that all heads share, that are rotated. Even. */
  qk_rope_head_dim: size,
  /** Features of a value in each head. */
  v_head_dim: size,
  /** Whether adjacent features are rotated in pairs (released layout), not halves. Default true. */
  rope_interleave: z.boolean().default(true),
  /** Depth of multi-token prediction: extra layers behind the last. Default 0. */
  num_nextn_predict_layers: z.int().nonnegative().default(0),
  /** MTP modules with embeddings and heads of their own. Not a key of the released models, whose readers share them regardless. */
  mtp_separate_embeddings: z.boolean().default(false),
  /** Every layer behind the dense ones has experts. */
  moe_layer_freq: z.literal(1).default(1),
})

/** Models with latent attention as a user writes them. @interface */
export type LatentConfigInput = z.input<typeof latentFields>
/** DeepSeek LLM as a user writes it. @interface */
export type DenseConfigInput = z.input<typeof denseFields>
/** What a user writes: config.json, or a preset with changes. */
export type DeepSeekConfigInput = LatentConfigInput | DenseConfigInput

/**
 * A checked configuration with every default filled in. A dense one (model_type `llama`) has no latents and no experts: kv_lora_rank, qk_nope_head_dim and
 * moe_intermediate_size are 0, and the features of a head are both qk_rope_head_dim and v_head_dim.
 */
export interface DeepSeekConfig
  extends Omit<
    Fields,
    'model_type' | 'rope_scaling' | 'rope_parameters' | 'rope_theta' | 'partial_rotary_factor' | 'mlp_layer_types'
  > {
  /** What it is saved as. Kimi K2 is `deepseek_v3` here. */
  readonly model_type: ModelTypeName
  /** Heads of keys and values; with latents as many as there are heads. */
  readonly num_key_value_heads: number
  /** As given, else 10000. */
  readonly rope_theta: number
  /** YaRN with its original context, or null. */
  readonly rope_scaling: RopeScaling | null
  /** As given, else sigmoid with noaux_tc and softmax otherwise. */
  readonly scoring_func: 'sigmoid' | 'softmax'
}

/**
 * Checks a configuration and fills in defaults. Of a model that sees it is that of the text model (`text_config`).
 * @throws MoeError E_CONFIG with every fault in one message; for a model_type that is not of this architecture with those that are
 */
export function parseConfig(input: unknown): DeepSeekConfig {
  const given = isObject(input) ? textConfig(input as Json) : input
  const type = isObject(given) ? modelTypeOf(given as Json) : 'deepseek_v3'
  const dense = type === 'llama'
  checkShared('DeepSeek', given as object, fieldsOf(type))
  const json = inTermsOfV3(type, given as Json)
  for (const key of ropeKeys) {
    const scaling = json[key]
    if (isObject(scaling)) checkShared(`DeepSeek ${key}`, scaling, ropeFields.shape)
  }
  const result = dense
    ? denseFields.transform(withoutLatents).safeParse(json)
    : latentFields.transform(withLatents).safeParse(json)
  const problems = result.success
    ? [...crossChecks(result.data), ...unreadable(type, result.data), ...ropeFaults(json, result.data)]
    : result.error.issues.map(issue => `${issue.path.join('.') || 'config'}: ${issue.message}`)
  if (!result.success || problems.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'DeepSeek',
      problem: `the configuration has ${problems.length} ${problems.length === 1 ? 'fault' : 'faults'}:\n${problems.map(problem => `  - ${problem}`).join('\n')}\n`,
      fix: 'mend them, or start from one of the presets',
      details: { problems },
    })
  }
  const { rope_parameters, rope_scaling, partial_rotary_factor, mlp_layer_types, ...rest } = result.data
  const { topk_method, scoring_func, rope_theta } = rest
  return {
    ...rest,
    scoring_func: scoring_func ?? (topk_method === 'noaux_tc' ? 'sigmoid' : 'softmax'),
    rope_theta: rope_theta ?? rope_scaling?.rope_theta ?? rope_parameters?.rope_theta ?? 10000,
    rope_scaling: yarn(rope_scaling ?? rope_parameters, rest.max_position_embeddings),
  }
}

/** A configuration with changes, whose context is extended from the one that it had. */
export function changedConfig(
  config: DeepSeekConfigInput,
  changes: Partial<LatentConfigInput> | Partial<DenseConfigInput>,
): DeepSeekConfigInput {
  const { rope_parameters: _, ...others } = config
  const { rope_theta, rope_scaling, max_position_embeddings } = parseConfig(config)
  const original = rope_scaling?.original_max_position_embeddings ?? max_position_embeddings
  const extended = changes.rope_scaling && { original_max_position_embeddings: original, ...changes.rope_scaling }
  const changed = { ...others, rope_theta, rope_scaling, ...changes }
  return { ...changed, ...(extended && { rope_scaling: extended }) } as DeepSeekConfigInput
}

/** What of a config.json is ours: files have the names of all programs that read them. */
export function ownKeys(json: Json): Json {
  const text = textConfig(json)
  const own = pick(text, fieldsOf(modelTypeOf(text)))
  for (const scaling of ropeKeys) {
    const given = own[scaling]
    // What layers of one kind have to themselves stays for the checks.
    if (isObject(given)) own[scaling] = { ...pick(given, ropeFields.shape), ...groupsIn(given) }
  }
  return own
}

const fieldsOf = (type: ModelTypeName) => (type === 'llama' ? denseFields.shape : latentFields.shape)

const ropeKeys = ['rope_scaling', 'rope_parameters'] as const

const isObject = (value: unknown): value is object => typeof value === 'object' && value !== null

const pick = (given: object, names: object): Record<string, unknown> =>
  Object.fromEntries(Object.entries(given).filter(([name]) => Object.hasOwn(names, name)))

/** Rope settings within rope settings: those of one kind of layers, as models with sliding windows have them. */
const groupsIn = (scaling: object): Record<string, unknown> =>
  Object.fromEntries(Object.entries(scaling).filter(([, value]) => isObject(value) && !Array.isArray(value)))

type Fields = z.output<typeof latentFields>
type CheckedFields = ReturnType<typeof withLatents>

const withLatents = (config: Fields) => ({
  ...config,
  model_type: config.model_type as DeepSeekConfig['model_type'],
  num_key_value_heads: config.num_attention_heads,
})

/** A dense configuration in the terms of the others. */
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
    num_nextn_predict_layers: 0,
    mtp_separate_embeddings: false,
    moe_layer_freq: 1,
  }
}

/** Faults that only show when fields are seen together. */
function crossChecks(config: CheckedFields): string[] {
  const problems: string[] = []
  const add = (wrong: boolean, problem: string) => {
    if (wrong) problems.push(problem)
  }
  const { n_routed_experts: experts, num_experts_per_tok: topK, n_group: groups, topk_group: topGroups } = config
  const { num_attention_heads: heads, num_key_value_heads: groups_kv, qk_rope_head_dim: turned } = config
  if (config.model_type === 'llama') {
    add(!Number.isInteger(turned), `num_attention_heads = ${heads} does not divide hidden_size = ${config.hidden_size}`)
    add(heads % groups_kv !== 0, `num_key_value_heads = ${groups_kv} does not divide num_attention_heads = ${heads}`)
    add(turned % 2 === 1, `head_dim = ${turned} is odd`)
  } else add(turned % 2 !== 0, `qk_rope_head_dim = ${turned} is odd`)
  if (experts === null) add(topK !== null, 'num_experts_per_tok is there, but n_routed_experts is missing')
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
  }
  add(
    config.bos_token_id != null && config.bos_token_id >= config.vocab_size,
    `bos_token_id = ${config.bos_token_id} is outside the vocabulary of ${config.vocab_size}`,
  )
  return problems
}

/** Faults of what positions are turned by. */
function ropeFaults(json: Json, config: CheckedFields): string[] {
  const problems: string[] = []
  const add = (wrong: boolean, problem: string) => {
    if (wrong) problems.push(problem)
  }
  for (const key of ropeKeys) {
    for (const group of Object.keys(groupsIn(json[key] ?? {}))) {
      add(true, `${key}.${group}: layers cannot have rope settings of their own`)
    }
  }
  const { rope_scaling, rope_parameters } = config
  const scaling = rope_scaling ?? rope_parameters
  const type = scaling?.rope_type ?? scaling?.type
  add(
    type !== undefined && type !== 'default' && type !== 'yarn',
    `rope type ${JSON.stringify(type)} is not supported (default, yarn)`,
  )
  add(
    scaling?.type !== undefined && scaling.type !== type,
    `rope_scaling.type = ${JSON.stringify(scaling?.type)}, but rope_scaling.rope_type = ${JSON.stringify(type)}`,
  )
  add(type === undefined && scaling?.factor !== undefined, 'rope_scaling.type is missing')
  add(type === 'yarn' && scaling?.factor === undefined, 'rope_scaling.factor is missing')
  const amplitude = rotaryAmplitude(yarn(scaling, config.max_position_embeddings))
  const given = scaling?.attention_factor ?? amplitude
  add(
    Math.abs(given - amplitude) > 1e-6,
    `rope_scaling.attention_factor = ${given}: the other numbers make it ${amplitude}`,
  )
  const bases = [config.rope_theta, rope_scaling?.rope_theta, rope_parameters?.rope_theta].filter(x => x !== undefined)
  add(new Set(bases).size > 1, `rope_theta is ${[...new Set(bases)].join(' and ')}: it stands in several places`)
  return problems
}

/** Where the original context is not told, it is that of the configuration, as in transformers. */
function yarn(scaling: Fields['rope_scaling'], context: number): RopeScaling | null {
  if (!scaling || (scaling.rope_type ?? scaling.type) !== 'yarn') return null
  const {
    factor = 1,
    original_max_position_embeddings = context,
    beta_fast,
    beta_slow,
    mscale,
    mscale_all_dim,
  } = scaling
  return { type: 'yarn', factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, mscale_all_dim }
}

/** Whether layer i has experts. */
export const isMoELayer = (config: DeepSeekConfig, layer: number): boolean =>
  config.n_routed_experts !== null && layer >= config.first_k_dense_replace

/** Token ids that end a text. */
export function endTokens(config: DeepSeekConfig): number[] {
  const { eos_token_id: eos } = config
  return eos == null ? [] : Array.isArray(eos) ? eos : [eos]
}

/** What is written to config.json: the keys that transformers, vLLM and others read under its name, and no null where they have numbers. */
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
  const { mtp_separate_embeddings, ...rest } = others
  const { architecture, write } = modelTypes[config.model_type]
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
    ...(mtp_separate_embeddings ? { mtp_separate_embeddings } : {}),
    num_key_value_heads: config.num_attention_heads,
    torch_dtype: 'float32',
    ...write?.(config),
  }
  return Object.fromEntries(Object.entries(written).filter(([, value]) => value !== undefined))
}

/** Keys that transformers wants as floats: 1 is refused, 1.0 is not. */
const floatKeys =
  'routed_scaling_factor|rms_norm_eps|initializer_range|embedding_initializer_range|rope_theta|factor|beta_fast|beta_slow|mscale|mscale_all_dim'

/** The text of config.json. */
export function configJson(config: DeepSeekConfig): string {
  const text = JSON.stringify(hfConfig(config), null, 2)
  return `${text.replace(new RegExp(`("(?:${floatKeys})": -?\\d+)(?=,?$)`, 'gm'), '$1.0')}\n`
}
