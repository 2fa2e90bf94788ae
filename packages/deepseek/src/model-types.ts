/** @file The supported values of `model_type` in config.json, and their conversion to the keys of DeepSeek-V3. */
import { MoeError } from '@moe/core'

/** Content of a config.json. */
export type Json = Readonly<Record<string, unknown>>

interface HeadSizes {
  readonly qk_nope_head_dim: number
  readonly qk_rope_head_dim: number
}

/** Fields that some model types store under other keys. */
interface Written extends HeadSizes {
  readonly num_hidden_layers: number
  readonly rope_theta?: number | undefined
  readonly rope_scaling?: object | null | undefined
  readonly first_k_dense_replace: number
  readonly n_routed_experts: number | null
}

interface ModelType {
  /** The class in transformers that opens models of this type. */
  readonly architecture: string
  /** Whether attention is sparse, to keys that indexers select. */
  readonly isSparse?: true
  /** Whether layers can share an indexer. */
  readonly sharesIndexers?: true
  /** Whether queries are scaled by their positions. */
  readonly scalesQueries?: true
  /** The only possible `partial_rotary_factor`: the share of rotated features in what the type calls a head. Default 1. */
  readonly rotaryShare?: (config: HeadSizes) => number
  /** Whether the experts of a layer are stacked in checkpoints: see stacked-experts.ts. */
  readonly stacksExperts?: true
  /** Defaults that differ from those of V3. */
  readonly defaults: Json
  /** Values that all models of this type have. Readers of this type ignore these keys. */
  readonly fixed?: Json
  /** Converts its own keys to those of V3. */
  readonly read?: (json: Json) => Json
  /** Returns its own keys, and undefined for keys of V3 that this type does not have. */
  readonly write?: (config: Written) => Json
}

/** Removes the keys of V3 that a model without experts does not have. */
const noExperts = Object.fromEntries(
  `moe_intermediate_size first_k_dense_replace moe_layer_freq n_shared_experts topk_method scoring_func norm_topk_prob
  routed_scaling_factor num_nextn_predict_layers`
    .split(/\s+/)
    .map(key => [key, undefined]),
)

const shareOfHead = ({ qk_nope_head_dim: nope, qk_rope_head_dim: rotated }: HeadSizes): number =>
  rotated / (nope + rotated)

/** The RoPE settings of a Mistral4Config without any. */
const mistralRope: Json = {
  rope_type: 'yarn',
  factor: 128,
  original_max_position_embeddings: 8192,
  beta_fast: 32,
  beta_slow: 1,
  mscale: 1,
  mscale_all_dim: 1,
  llama_4_scaling_beta: 0.1,
}

const types = {
  deepseek_v3: { architecture: 'DeepseekV3ForCausalLM', defaults: {} },
  /** DeepSeek-V3.2: sparse attention. */
  deepseek_v32: {
    architecture: 'DeepseekV32ForCausalLM',
    isSparse: true,
    defaults: { index_topk: 2048, index_n_heads: 64, index_head_dim: 128 },
    fixed: { rope_interleave: true, indexer_rope_interleave: false },
  },
  deepseek_v2: {
    architecture: 'DeepseekV2ForCausalLM',
    defaults: { topk_method: 'greedy', norm_topk_prob: false },
    fixed: { rope_interleave: true },
  },
  /** GLM-4.7-Flash. */
  glm4_moe_lite: {
    architecture: 'Glm4MoeLiteForCausalLM',
    defaults: {
      n_shared_experts: 1,
      routed_scaling_factor: 1.8,
      rms_norm_eps: 1e-5,
      max_position_embeddings: 202752,
    },
    fixed: { topk_method: 'noaux_tc', scoring_func: 'sigmoid' },
    read: json => ({
      ...json,
      first_k_dense_replace: json.first_k_dense_replace ?? leadingDense(json.mlp_layer_types) ?? 1,
    }),
    write: config => ({ mlp_layer_types: layerKinds(config) }),
  },
  /** GLM-5: sparse attention. From GLM-5.2 on, layers share indexers. */
  glm_moe_dsa: {
    architecture: 'GlmMoeDsaForCausalLM',
    isSparse: true,
    sharesIndexers: true,
    defaults: {
      n_shared_experts: 1,
      routed_scaling_factor: 2.5,
      rms_norm_eps: 1e-5,
      max_position_embeddings: 202752,
      index_topk: 2048,
      index_n_heads: 32,
      index_head_dim: 128,
      indexer_rope_interleave: true,
    },
    fixed: {
      topk_method: 'noaux_tc',
      scoring_func: 'sigmoid',
      rope_interleave: true,
      indexer_rope_interleave: true,
    },
    read: json => ({
      ...json,
      first_k_dense_replace: json.first_k_dense_replace ?? leadingDense(json.mlp_layer_types) ?? 3,
    }),
    write: config => ({ mlp_layer_types: layerKinds(config) }),
  },
  /** Youtu-LLM: latent attention without experts. */
  youtu: {
    architecture: 'YoutuForCausalLM',
    defaults: { tie_word_embeddings: true, max_position_embeddings: 131072 },
    fixed: { n_routed_experts: null, num_nextn_predict_layers: 0 },
    read: json => {
      const initializer_range = json.initializer_range ?? 2 / Math.sqrt(5 * Number(json.hidden_size))
      const ofEmbedding = json.embedding_initializer_range ?? 2 * Number(initializer_range)
      return { ...json, initializer_range, embedding_initializer_range: ofEmbedding }
    },
    write: () => noExperts,
  },
  /** Mistral Small 4: queries are scaled by their positions, and the gate of V2 without groups. */
  mistral4: {
    architecture: 'Mistral4ForCausalLM',
    scalesQueries: true,
    rotaryShare: shareOfHead,
    stacksExperts: true,
    defaults: {
      n_shared_experts: 1,
      n_group: 1,
      topk_group: 1,
      topk_method: 'greedy',
      scoring_func: 'softmax',
      max_position_embeddings: 1048576,
    },
    fixed: { n_group: 1, topk_method: 'greedy', scoring_func: 'softmax', num_nextn_predict_layers: 0 },
    read: ({ rope_scaling, rope_parameters, ...json }) => {
      const given = (rope_scaling ?? rope_parameters ?? mistralRope) as Json
      return { ...json, rope_scaling: given }
    },
    write: config => {
      const { type, ...scaling } = config.rope_scaling as Json
      const { rope_theta } = config
      const rope_parameters = { rope_type: type, rope_theta, ...scaling, partial_rotary_factor: shareOfHead(config) }
      return { rope_theta: undefined, rope_scaling: undefined, rope_parameters }
    },
  },
  /** DeepSeek LLM: attention without latents. In a validated configuration, v_head_dim is the size of a head. */
  llama: {
    architecture: 'LlamaForCausalLM',
    defaults: {},
    read: json => ({ ...json, head_dim: json.head_dim ?? json.v_head_dim }),
  },
} as const satisfies Readonly<Record<string, ModelType>>

/** A supported `model_type`. */
export type ModelTypeName = keyof typeof types

export const modelTypes: Readonly<Record<ModelTypeName, ModelType>> = types

const namesOf = (of: (type: ModelType) => boolean | undefined): string =>
  Object.entries(modelTypes)
    .filter(([, type]) => of(type))
    .map(([name]) => name)
    .join(' and ')

/** The names of the types with sparse attention. */
export const sparseTypes = namesOf(({ isSparse }) => isSparse)

/** The names of the types whose layers can share an indexer. */
export const sharingTypes = namesOf(({ sharesIndexers }) => sharesIndexers)

/** Other names of supported types, which transformers does not know. */
export const aliases = { kimi_k2: 'deepseek_v3' } as const satisfies Readonly<Record<string, ModelTypeName>>

/** Multimodal models, whose `text_config` is the configuration of a text model. */
const multimodal: ReadonlySet<unknown> = new Set(['kimi_k25', 'kimi_vl', 'mistral3'])

/** Related models that are not supported, and why. */
const unsupportedTypes: Readonly<Record<string, string>> = {
  axk1: 'it has a norm after the experts',
  axk2: 'its attention is sparse in another way',
  deepseek_v4: 'its attention is sparse in another way',
  dots1: 'its attention has no latents',
  glm4_moe: 'its attention has no latents',
  glm5_next: 'its attention is sparse in another way',
  hy_v4: 'its attention is sparse in another way',
  kimi_linear: 'most of its attention is linear',
  longcat_flash: 'its layers have two attention blocks each, and zero-computation experts',
  minicpm3: 'it scales embeddings, residuals and logits',
  solar_open: 'its attention has no latents',
}

/**
 * Returns the model type of a configuration.
 * @throws MoeError E_CONFIG if it is not supported
 */
export function modelTypeOf({ model_type: name = 'deepseek_v3' }: Json): ModelTypeName {
  if (Object.hasOwn(types, name as string)) return name as ModelTypeName
  if (Object.hasOwn(aliases, name as string)) return aliases[name as keyof typeof aliases]
  const why = multimodal.has(name)
    ? 'its text_config is missing'
    : Object.hasOwn(unsupportedTypes, name as string)
      ? unsupportedTypes[name as string]
      : 'it is not of this architecture'
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'DeepSeek',
    problem: `model_type ${JSON.stringify(name)} is not supported: ${why}`,
    fix: `supported are ${[...Object.keys(types), ...Object.keys(aliases)].join(', ')}, and the text models of ${[...multimodal].join(', ')}`,
  })
}

/** Converts a configuration to the keys of V3 and adds the defaults of its type. */
export function toV3Keys(type: ModelTypeName, json: Json): Json {
  const { defaults, read = same => same } = modelTypes[type]
  const given = Object.fromEntries(Object.entries(json).filter(([key, value]) => value != null || !(key in defaults)))
  return read({ ...defaults, ...given, model_type: type })
}

/** Problems: values that readers of this model type would ignore. */
export function unreadable(type: ModelTypeName, config: Written & { mlp_layer_types?: unknown }): string[] {
  const { fixed = {} } = modelTypes[type]
  const given = config as unknown as Json
  const problems = Object.keys(fixed)
    .filter(key => given[key] !== undefined && given[key] !== fixed[key])
    .map(key => `${key} = ${JSON.stringify(given[key])}, but ${type} always has ${JSON.stringify(fixed[key])}`)
  const { mlp_layer_types: kinds } = config
  if (kinds != null && JSON.stringify(kinds) !== JSON.stringify(layerKinds(config))) {
    const { first_k_dense_replace: dense, num_hidden_layers: layers } = config
    problems.push(`mlp_layer_types must have ${layers} entries: "dense" ${dense} times, then "sparse"`)
  }
  return problems
}

/** The number of layers before the first with experts, or undefined if there is no list. */
function leadingDense(kinds: unknown): number | undefined {
  if (!Array.isArray(kinds)) return undefined
  const first = kinds.findIndex(kind => kind !== 'dense')
  return first < 0 ? kinds.length : first
}

function layerKinds({ num_hidden_layers, first_k_dense_replace, n_routed_experts }: Written): string[] {
  const dense = n_routed_experts === null ? num_hidden_layers : first_k_dense_replace
  return Array.from({ length: num_hidden_layers }, (_, layer) => (layer < dense ? 'dense' : 'sparse'))
}

/** Returns the configuration of the text model: all of it or, for a multimodal model, the nested one. */
export function textConfig(json: Json): Json {
  const { model_type: name, text_config: text, tie_word_embeddings: tied } = json
  if (!multimodal.has(name) || typeof text !== 'object' || text === null) return json
  return { ...text, ...(tied === undefined ? {} : { tie_word_embeddings: tied }) }
}

/** Whether the experts in the checkpoint of a configuration are stacked. */
export function stacksExperts(json: Json): boolean {
  const { model_type: name } = textConfig(json)
  return Object.hasOwn(types, String(name)) && modelTypes[name as ModelTypeName].stacksExperts === true
}

/** Whether the weights of the text model are part of a multimodal checkpoint. */
export const isNested = (json: Json): boolean => textConfig(json) !== json

/** Maps a weight's key in a multimodal model to that in the text model. Undefined for weights of other parts. */
export function textKey(key: string): string | undefined {
  if (key.startsWith('language_model.')) return key.slice('language_model.'.length)
  if (key.startsWith('model.language_model.')) return `model.${key.slice('model.language_model.'.length)}`
  return key === 'lm_head.weight' ? key : undefined
}
