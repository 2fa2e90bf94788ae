/** @file What an MoE layer is made of, in the terms of Hugging Face's config.json. */
import { checkShared, MoeError, type OptionNames, type RouterAttrs, shown } from '@moe/core'

/** Sizes of an MoE layer. They are those of Hugging Face's config.json, from which it may be taken as it is. */
export interface RouterConfig {
  /** Features of a token. */
  readonly hidden_size: number
  /** Inner features of each expert. */
  readonly moe_intermediate_size: number
  /** E, experts that a gate chooses among. */
  readonly n_routed_experts: number
  /** K, experts that each token goes through. */
  readonly num_experts_per_tok: number
  /** Shared experts: one SwiGLU net of n_shared_experts * moe_intermediate_size. 0 or null for none. */
  readonly n_shared_experts?: number | null
  /** Groups of experts (nodes). Default 1. */
  readonly n_group?: number | null
  /** Groups a token may use. Default all. */
  readonly topk_group?: number | null
  /** Divide the gates by their sum. Default true. */
  readonly norm_topk_prob?: boolean
  /** Factor on the gates, applied last. Default 1. */
  readonly routed_scaling_factor?: number
  /** Affinities: sigmoid of each logit, or softmax over all. Default sigmoid with noaux_tc, softmax otherwise. */
  readonly scoring_func?: 'sigmoid' | 'softmax'
  /** noaux_tc: V3 (bias, groups by their two best). group_limited_greedy: V2 (groups by their best). greedy: no groups. Default noaux_tc. */
  readonly topk_method?: 'noaux_tc' | 'group_limited_greedy' | 'greedy'
}

const names: OptionNames<RouterConfig> = {
  hidden_size: true,
  moe_intermediate_size: true,
  n_routed_experts: true,
  num_experts_per_tok: true,
  n_shared_experts: true,
  n_group: true,
  topk_group: true,
  norm_topk_prob: true,
  routed_scaling_factor: true,
  scoring_func: true,
  topk_method: true,
}

const methods = ['noaux_tc', 'group_limited_greedy', 'greedy']
const scorings = ['sigmoid', 'softmax']

/**
 * The attributes of the routing op that a configuration means.
 * @throws MoeError E_CONFIG with every fault in one message.
 */
export function routerAttrs(config: RouterConfig): RouterAttrs {
  checkShared('MoELayer', config, names)
  const { topk_method: method = 'noaux_tc', n_routed_experts: experts, num_experts_per_tok: topK } = config
  const grouped = method !== 'greedy'
  const groups = grouped ? (config.n_group ?? 1) : 1
  const topGroups = grouped ? (config.topk_group ?? groups) : 1
  const problems: string[] = []
  for (const key of ['hidden_size', 'moe_intermediate_size', 'n_routed_experts', 'num_experts_per_tok'] as const) {
    if (!Number.isInteger(config[key]) || config[key] < 1)
      problems.push(`${key} = ${shown(config[key])} is not a positive integer`)
  }
  if (!Number.isInteger(groups) || groups < 1 || experts % groups !== 0) {
    problems.push(`n_group = ${shown(groups)} does not divide n_routed_experts = ${experts}`)
  }
  if (!Number.isInteger(topGroups) || topGroups < 1 || topGroups > groups) {
    problems.push(`topk_group = ${shown(topGroups)} is not in 1..n_group = ${groups}`)
  }
  const reachable = Math.floor(experts / groups) * topGroups
  if (topK > reachable)
    problems.push(`num_experts_per_tok = ${topK} exceeds the ${reachable} experts of the kept groups`)
  const { n_shared_experts: shared, scoring_func: scoring, routed_scaling_factor: scale = 1 } = config
  if (shared != null && !(Number.isInteger(shared) && shared >= 0)) {
    problems.push(`n_shared_experts = ${shown(shared)} is not a whole number from 0`)
  }
  if (!methods.includes(method)) {
    problems.push(`topk_method = ${JSON.stringify(method)} is not known (${methods.join(', ')})`)
  }
  if (scoring !== undefined && !scorings.includes(scoring)) {
    problems.push(`scoring_func = ${JSON.stringify(scoring)} is not known (${scorings.join(', ')})`)
  }
  if (!Number.isFinite(scale)) problems.push(`routed_scaling_factor = ${shown(scale)} is not a number`)
  if (problems.length > 0) throw new MoeError({ code: 'E_CONFIG', op: 'MoELayer', problem: problems.join('; ') })
  return {
    scoring: scoring ?? (method === 'noaux_tc' ? 'sigmoid' : 'softmax'),
    groups,
    topGroups,
    groupScore: method === 'noaux_tc' ? 'top2' : 'max',
    topK,
    normalize: config.norm_topk_prob ?? true,
    scale,
  }
}
