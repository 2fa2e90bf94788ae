/** @file The RoPE settings of a configuration: their fields, checks, and conversion to those of attention. */
import { type RopeScaling, rotaryAmplitude } from '@moe/attention-mla'
import { z } from 'zod'
import { type Json, type ModelTypeName, modelTypes } from './model-types.ts'

/** RoPE settings, as in V3's config.json (`rope_scaling`) and as transformers 5 writes them (`rope_parameters`). */
export const ropeFields = z.object({
  type: z.string().optional(),
  rope_type: z.string().optional(),
  rope_theta: z.number().positive().optional(),
  factor: z.number().positive().optional(),
  original_max_position_embeddings: z.int().positive().optional(),
  beta_fast: z.number().positive().optional(),
  beta_slow: z.number().positive().optional(),
  mscale: z.number().optional(),
  mscale_all_dim: z.number().optional(),
  /** Rejected unless it is the value that follows from the other numbers. */
  attention_factor: z.number().nullish(),
  /** Whether the bounds of the YaRN ramp are rounded; always true. */
  truncate: z.literal(true).nullish(),
  /** Share of the features of a head that are rotated: 1, except in mistral4, whose heads include those that are not. */
  partial_rotary_factor: z.number().nullish(),
  /** Scaling of queries by their positions, for mistral4; see `RopeScaling`. */
  llama_4_scaling_beta: z.number().nonnegative().nullish(),
})

/** The keys of RoPE settings. */
export const ropeKeys = ['rope_scaling', 'rope_parameters'] as const

export const isObject = (value: unknown): value is object => typeof value === 'object' && value !== null

/** Nested RoPE settings, for layers of one kind, as in models with sliding windows. */
export const groupsIn = (scaling: object): Record<string, unknown> =>
  Object.fromEntries(Object.entries(scaling).filter(([, value]) => isObject(value) && !Array.isArray(value)))

type Scaling = z.output<typeof ropeFields> | null | undefined

/** The part of a configuration that the checks read. */
interface RopeConfig {
  readonly model_type: ModelTypeName
  readonly max_position_embeddings: number
  readonly qk_nope_head_dim: number
  readonly qk_rope_head_dim: number
  readonly rope_theta?: number | undefined
  readonly rope_scaling?: Scaling
  readonly rope_parameters?: Scaling
}

/** Returns the problems of the RoPE settings. `json` is the configuration before validation. */
export function ropeProblems(json: Json, config: RopeConfig): string[] {
  const problems: string[] = []
  const add = (wrong: boolean, problem: string) => {
    if (wrong) problems.push(problem)
  }
  for (const key of ropeKeys) {
    for (const group of Object.keys(groupsIn(json[key] ?? {}))) {
      add(true, `${key}.${group}: separate RoPE settings for some layers are not supported`)
    }
  }
  const { rope_scaling, rope_parameters } = config
  const scaling = rope_scaling ?? rope_parameters
  const type = scaling?.rope_type ?? scaling?.type
  add(
    type !== undefined && type !== 'default' && type !== 'yarn',
    `rope type ${JSON.stringify(type)} is not supported (expected default or yarn)`,
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
    `rope_scaling.attention_factor = ${given}, but the other settings give ${amplitude}`,
  )
  const { scalesQueries = false, rotaryShare = () => 1 } = modelTypes[config.model_type]
  const beta = scaling?.llama_4_scaling_beta
  add(!scalesQueries && !!beta, `rope_scaling.llama_4_scaling_beta: got ${beta}, expected 0 for ${config.model_type}`)
  add(scalesQueries && type !== 'yarn', `rope_scaling.rope_type must be "yarn" for ${config.model_type}`)
  add(scalesQueries && beta == null, 'rope_scaling.llama_4_scaling_beta is missing')
  const share = rotaryShare(config)
  for (const key of ropeKeys) {
    const rotated = config[key]?.partial_rotary_factor ?? share
    add(Math.abs(rotated - share) > 1e-6, `${key}.partial_rotary_factor: got ${rotated}, expected ${share}`)
  }
  const bases = [config.rope_theta, rope_scaling?.rope_theta, rope_parameters?.rope_theta].filter(x => x !== undefined)
  add(new Set(bases).size > 1, `rope_theta has conflicting values: ${[...new Set(bases)].join(' and ')}`)
  return problems
}

/** Returns the settings of YaRN, or null without it. The original context length defaults to that of the configuration, as in transformers. */
export function yarn(scaling: Scaling, context: number): RopeScaling | null {
  if (!scaling || (scaling.rope_type ?? scaling.type) !== 'yarn') return null
  const {
    factor = 1,
    original_max_position_embeddings = context,
    beta_fast,
    beta_slow,
    mscale,
    mscale_all_dim,
    llama_4_scaling_beta: beta,
  } = scaling
  const yarn = { factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, mscale_all_dim }
  return { type: 'yarn', ...yarn, ...(beta != null && { llama_4_scaling_beta: beta }) }
}
