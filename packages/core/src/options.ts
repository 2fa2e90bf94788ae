/** @file What a user's options are asked: whether anybody reads their names. Who writes JavaScript, or spreads objects, learns it from no compiler. */
import { describe, MoeError } from './errors.ts'

/** All names of some options: an object that lacks one, or has another, does not compile. Its values mean nothing. @internal */
export type OptionNames<Options> = { readonly [Name in keyof Options]-?: unknown }

/**
 * Refuses options that are no object, and names that are not among `names`; what is undefined is not given.
 * @param names type-checked against the options: `{ lr: true, steps: true }`
 * @throws MoeError E_CONFIG with the nearest known name, or all of them
 * @internal
 */
export function checkOptions<Options extends object>(
  op: string,
  options: Options,
  names: OptionNames<NoInfer<Options>>,
): void {
  needObject(op, options, names)
  // Also those that it inherits: they are read like its own.
  for (const name in options) {
    if (!Object.hasOwn(names, name) && options[name] !== undefined) throw unknownName(op, name, names)
  }
}

/** What a configuration of other model families has for these names of ours: in a preset with changes it would change nothing. */
const elsewhere: Readonly<Record<string, string>> = {
  vocab_size: 'n_vocab vocabulary_size',
  hidden_size: 'd_model n_embd dim embed_dim model_dim hidden_dim',
  intermediate_size: 'd_ff ffn_dim inter_dim n_inner ffn_hidden_size',
  moe_intermediate_size: 'moe_inter_dim moe_ffn_hidden_size',
  num_hidden_layers: 'num_layers n_layers n_layer',
  num_attention_heads: 'num_heads n_heads n_head',
  num_key_value_heads: 'num_kv_heads n_kv_heads',
  max_position_embeddings: 'n_positions n_ctx block_size max_seq_len context_length',
  first_k_dense_replace: 'n_dense_layers',
  n_routed_experts: 'num_experts n_experts num_routed_experts',
  n_shared_experts: 'num_shared_experts',
  num_experts_per_tok: 'top_k moe_topk n_activated_experts num_selected_experts num_experts_per_token',
  n_group: 'n_expert_groups',
  topk_group: 'n_limited_groups',
  scoring_func: 'score_func',
  routed_scaling_factor: 'route_scale',
  num_nextn_predict_layers: 'num_mtp_layers num_mtp_modules',
  rms_norm_eps: 'norm_eps layer_norm_eps layer_norm_epsilon',
}

/**
 * The same for what others read as well: a configuration in the terms of config.json, options that are handed on to all parts of a model. Names that are not among
 * `names` are let through, unless they are a slip away from one (a letter more, less, another or swapped, or written in other case or without underscores), or what other model
 * families call one (`num_layers`, `d_model`).
 * @throws MoeError E_CONFIG
 * @internal
 */
export function checkShared<Options extends object>(
  op: string,
  options: Options,
  names: OptionNames<NoInfer<Options>>,
): void {
  needObject(op, options, names)
  for (const name in options) {
    if (Object.hasOwn(names, name) || options[name] === undefined) continue
    const meant = nearest(name, names, 1) ?? ours(name, names)
    if (meant !== undefined) throw unknownName(op, name, names, meant)
  }
}

function needObject(op: string, value: unknown, names: object): void {
  if (typeof value === 'object' && value !== null) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: `${describe(value)} is given in place of options`,
    fix: `pass an object: { ${Object.keys(names).join(', ')} }`,
  })
}

const ours = (name: string, names: object): string | undefined =>
  Object.keys(elsewhere).find(known => Object.hasOwn(names, known) && elsewhere[known].split(' ').includes(name))

function unknownName(
  op: string,
  name: string,
  names: object,
  near = nearest(name, names, name.length > 4 ? 2 : 1),
): MoeError {
  const known = Object.keys(names)
  return new MoeError({
    code: 'E_CONFIG',
    op,
    problem: `there is no option ${name}`,
    fix: near === undefined ? `there are ${known.join(', ')}` : `did you mean ${near}?`,
    details: { name, known },
  })
}

/** The known name that is the fewest slips away, at most `limit`. */
function nearest(name: string, names: object, limit: number): string | undefined {
  let best: string | undefined
  let fewest = limit + 1
  for (const known of Object.keys(names)) {
    if (Math.abs(known.length - name.length) >= fewest && bare(known) !== bare(name)) continue
    const slips = slipsBetween(name, known)
    if (slips < fewest) {
      best = known
      fewest = slips
    }
  }
  return best
}

const bare = (name: string): string => name.replaceAll('_', '').toLowerCase()

/** Letters to insert, to leave out, to replace or to swap with the next; 0 where only case and underscores differ. */
function slipsBetween(a: string, b: string): number {
  if (bare(a) === bare(b)) return 0
  let [before, last]: number[][] = [[], []]
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    ;[before, last, row] = [last, row, [i]]
    for (let j = 1; j <= b.length; j++) {
      row[j] = Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1))
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1)
    }
  }
  return row[b.length]
}
