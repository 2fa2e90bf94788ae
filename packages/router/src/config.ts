/** @file Configuration of an MoE layer, in the terms of Hugging Face's config.json. */
import { checkShared, MoeError, type OptionNames, type RouterAttrs, shown } from '@moe/core'

/** Sizes of an MoE layer. You can pass a complete Hugging Face config.json. */
export interface RouterConfig {
  /** Features of a token. */
  readonly hidden_size: number
  /** Intermediate features of each expert. */
  readonly moe_intermediate_size: number
  /** E, the number of routed experts. */
  readonly n_routed_experts: number
  /** K, the number of experts per token. */
  readonly num_experts_per_tok: number
  /**
   * Number of shared experts, implemented as one SwiGLU network with n_shared_experts * moe_intermediate_size features.
   * 0 or null for none.
   */
  readonly n_shared_experts?: number | null | undefined
  /** Number of expert groups (nodes). Default 1. */
  readonly n_group?: number | null | undefined
  /** Number of groups that a token may use. Default: all. */
  readonly topk_group?: number | null | undefined
  /** Whether to divide the gates by their sum. Default true. */
  readonly norm_topk_prob?: boolean | undefined
  /** Factor on the gates, applied last. Default 1. */
  readonly routed_scaling_factor?: number | undefined
  /** Affinities: sigmoid of each logit, or softmax over all. Default: sigmoid for noaux_tc, softmax otherwise. */
  readonly scoring_func?: 'sigmoid' | 'softmax' | undefined
  /**
   * How experts are chosen. noaux_tc: as in V3 (selection bias; groups scored by their top 2). group_limited_greedy: as
   * in V2 (groups scored by their maximum). greedy: without groups. Default noaux_tc.
   */
  readonly topk_method?: 'noaux_tc' | 'group_limited_greedy' | 'greedy' | undefined
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
 * Returns the attributes of `routerTopk` for a configuration.
 * @throws MoeError E_CONFIG that lists all problems
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
    problems.push(`n_shared_experts = ${shown(shared)} is not an integer of at least 0`)
  }
  if (!methods.includes(method)) {
    problems.push(`topk_method = ${JSON.stringify(method)} is not one of ${methods.join(', ')}`)
  }
  if (scoring !== undefined && !scorings.includes(scoring)) {
    problems.push(`scoring_func = ${JSON.stringify(scoring)} is not one of ${scorings.join(', ')}`)
  }
  if (!Number.isFinite(scale)) problems.push(`routed_scaling_factor = ${shown(scale)} is not a finite number`)
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
