/** @file The names that models of this architecture have in config.json (`model_type`), each in the terms of DeepSeek-V3. */
import { MoeError } from '@moe/core'

/** Keys of a config.json, as they stand there. */
export type Json = Readonly<Record<string, unknown>>

/** What is written otherwise under some names. */
interface Written {
  readonly num_hidden_layers: number
  readonly first_k_dense_replace: number
  readonly n_routed_experts: number | null
}

interface ModelType {
  /** The class of transformers that opens what is saved under this name. */
  readonly architecture: string
  /** What keys mean that are not there, where it is not what they mean in V3. */
  readonly defaults: Json
  /** What keys say in every model of this name: its readers do not ask for them. */
  readonly fixed?: Json
  /** Keys of its own in those of V3. */
  readonly read?: (json: Json) => Json
  /** Keys of its own for its readers, and those of V3 that it does not have, undefined. */
  readonly write?: (config: Written) => Json
}

/** Keys of V3 that a model without experts does not have. */
const noExperts = Object.fromEntries(
  `moe_intermediate_size first_k_dense_replace moe_layer_freq n_shared_experts topk_method scoring_func norm_topk_prob
  routed_scaling_factor num_nextn_predict_layers`
    .split(/\s+/)
    .map(key => [key, undefined]),
)

const types = {
  deepseek_v3: { architecture: 'DeepseekV3ForCausalLM', defaults: {} },
  deepseek_v2: {
    architecture: 'DeepseekV2ForCausalLM',
    defaults: { topk_method: 'greedy', norm_topk_prob: false },
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
  /** Youtu-LLM: latent attention, and no experts. */
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
  /** DeepSeek LLM: attention without latents. A checked configuration has the features of a head as those of a value. */
  llama: {
    architecture: 'LlamaForCausalLM',
    defaults: {},
    read: json => ({ ...json, head_dim: json.head_dim ?? json.v_head_dim }),
  },
} as const satisfies Readonly<Record<string, ModelType>>

/** A name that configurations have here, and that models are saved under. */
export type ModelTypeName = keyof typeof types

export const modelTypes: Readonly<Record<ModelTypeName, ModelType>> = types

/** Other names of the same, which transformers does not know. */
export const aliases = { kimi_k2: 'deepseek_v3' } as const satisfies Readonly<Record<string, ModelTypeName>>

/** Models that see, whose `text_config` is the configuration of a text model. */
const seeing: ReadonlySet<unknown> = new Set(['kimi_k25', 'kimi_vl'])

/** Relatives, and what of them is not here. */
const relatives: Readonly<Record<string, string>> = {
  axk1: 'it has a norm behind the experts',
  axk2: 'its attention is sparse',
  deepseek_v32: 'its attention is sparse',
  deepseek_v4: 'its attention is sparse',
  dots1: 'its attention has no latents',
  glm4_moe: 'its attention has no latents',
  glm5_next: 'its attention is sparse',
  glm_moe_dsa: 'its attention is sparse',
  hy_v4: 'its attention is sparse',
  kimi_linear: 'most of its attention is linear',
  longcat_flash: 'its layers have two attentions each, and experts that do nothing',
  minicpm3: 'it scales embeddings, residuals and logits',
  mistral4: 'its queries are scaled by their positions',
  solar_open: 'its attention has no latents',
}

/**
 * The name of a configuration.
 * @throws MoeError E_CONFIG for one that is not of this architecture
 */
export function modelTypeOf({ model_type: name = 'deepseek_v3' }: Json): ModelTypeName {
  if (Object.hasOwn(types, name as string)) return name as ModelTypeName
  if (Object.hasOwn(aliases, name as string)) return aliases[name as keyof typeof aliases]
  const why = seeing.has(name)
    ? 'its text_config is missing'
    : Object.hasOwn(relatives, name as string)
      ? relatives[name as string]
      : 'it is no model of this architecture'
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'DeepSeek',
    problem: `model_type ${JSON.stringify(name)} is not supported: ${why}`,
    fix: `what opens is ${[...Object.keys(types), ...Object.keys(aliases)].join(', ')}, and the text model of ${[...seeing].join(', ')}`,
  })
}

/** A configuration in the terms of V3, with what its name says of keys that are not there. */
export function inTermsOfV3(type: ModelTypeName, json: Json): Json {
  const { defaults, read = same => same } = modelTypes[type]
  const given = Object.fromEntries(Object.entries(json).filter(([key, value]) => value != null || !(key in defaults)))
  return read({ ...defaults, ...given, model_type: type })
}

/** What keys would say that the readers of a name do not ask for. */
export function unreadable(type: ModelTypeName, config: Written & { mlp_layer_types?: unknown }): string[] {
  const { fixed = {} } = modelTypes[type]
  const given = config as unknown as Json
  const problems = Object.keys(fixed)
    .filter(key => given[key] !== undefined && given[key] !== fixed[key])
    .map(key => `${key} = ${JSON.stringify(given[key])}: in ${type} it is ${JSON.stringify(fixed[key])}`)
  const { mlp_layer_types: kinds } = config
  if (kinds != null && JSON.stringify(kinds) !== JSON.stringify(layerKinds(config))) {
    const { first_k_dense_replace: dense, num_hidden_layers: layers } = config
    problems.push(`mlp_layer_types is not ${dense} times "dense", then "sparse", in all ${layers}`)
  }
  return problems
}

/** How many layers have no experts before the first that has; undefined for what is no list. */
function leadingDense(kinds: unknown): number | undefined {
  if (!Array.isArray(kinds)) return undefined
  const first = kinds.findIndex(kind => kind !== 'dense')
  return first < 0 ? kinds.length : first
}

function layerKinds({ num_hidden_layers, first_k_dense_replace, n_routed_experts }: Written): string[] {
  const dense = n_routed_experts === null ? num_hidden_layers : first_k_dense_replace
  return Array.from({ length: num_hidden_layers }, (_, layer) => (layer < dense ? 'dense' : 'sparse'))
}

/** The configuration of the text model: all of it, or what a model that sees has nested. */
export function textConfig(json: Json): Json {
  const { model_type: name, text_config: text, tie_word_embeddings: tied } = json
  if (!seeing.has(name) || typeof text !== 'object' || text === null) return json
  return { ...text, ...(tied === undefined ? {} : { tie_word_embeddings: tied }) }
}

/** Whether the weights of the text model lie among others. */
export const isNested = (json: Json): boolean => textConfig(json) !== json

/** The key of a weight in the text model by that in a model that sees; undefined for weights of other parts. */
export function textKey(key: string): string | undefined {
  if (key.startsWith('language_model.')) return key.slice('language_model.'.length)
  if (key.startsWith('model.language_model.')) return `model.${key.slice('model.language_model.'.length)}`
  return key === 'lm_head.weight' ? key : undefined
}
