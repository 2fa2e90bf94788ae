/**
 * @file Runtime checks of option names, for callers whose mistakes no compiler finds: plain JavaScript, and spread
 * objects.
 */
import { describe, MoeError } from './errors.ts'

/**
 * An object with every option name as a key. It compiles only if it lists exactly the names of `Options`; its values
 * are ignored.
 * @internal
 */
export type OptionNames<Options> = { readonly [Name in keyof Options]-?: unknown }

/**
 * Checks that `options` is an object and that all its names are in `names`. Options whose value is undefined are
 * ignored.
 * @param names type-checked against the options, for example `{ lr: true, steps: true }`
 * @throws MoeError E_CONFIG that suggests the closest known name, or lists all of them
 * @internal
 */
export function checkOptions<Options extends object>(
  op: string,
  options: Options,
  names: OptionNames<NoInfer<Options>>,
): void {
  needObject(op, options, names)
  // `in` includes inherited names, which are read like own ones.
  for (const name in options) {
    if (!Object.hasOwn(names, name) && options[name] !== undefined) throw unknownName(op, name, names)
  }
}

/**
 * Our configuration names, and what other model families call them. Under those names, a value would have no effect.
 */
const namesElsewhere: Readonly<Record<string, string>> = {
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
 * Like `checkOptions`, for objects that other code reads too: a configuration in the terms of config.json, or options
 * passed on to all parts of a model. Unknown names are allowed, unless they look like a mistake: one typo away from a
 * known name (a letter added, missing, replaced or swapped), different only in case or underscores, or the name that
 * other model families use for it (`num_layers`, `d_model`).
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
    const meant = nearest(name, names, 1) ?? ourName(name, names)
    if (meant !== undefined) throw unknownName(op, name, names, meant)
  }
}

function needObject(op: string, value: unknown, names: object): void {
  if (typeof value === 'object' && value !== null) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: `expected an options object, got ${describe(value)}`,
    fix: `pass an object: { ${Object.keys(names).join(', ')} }`,
  })
}

const ourName = (name: string, names: object): string | undefined =>
  Object.keys(namesElsewhere).find(
    known => Object.hasOwn(names, known) && namesElsewhere[known].split(' ').includes(name),
  )

function unknownName(op: string, name: string, names: object, near = nearestName(name, names)): MoeError {
  const known = Object.keys(names)
  return new MoeError({
    code: 'E_CONFIG',
    op,
    problem: `unknown option ${name}`,
    fix: near === undefined ? `known options are ${known.join(', ')}` : `did you mean ${near}?`,
    details: { name, known },
  })
}

/**
 * Returns the known name (a key of `names`) that `name` is probably a misspelling of, or undefined.
 * @internal
 */
export const nearestName = (name: string, names: object): string | undefined =>
  nearest(name, names, name.length > 4 ? 2 : 1)

/** Returns the known name with the fewest typos, at most `limit`, or undefined. */
function nearest(name: string, names: object, limit: number): string | undefined {
  let best: string | undefined
  let fewest = limit + 1
  const bareName = bare(name)
  for (const known of Object.keys(names)) {
    const typos = bare(known) === bareName ? 0 : typosBetween(name, known, limit)
    if (typos < fewest) {
      best = known
      fewest = typos
    }
  }
  return best
}

const bare = (name: string): string => name.replaceAll('_', '').toLowerCase()

/** The number of letters to insert, remove, replace or swap with the next one, or any number above `limit`. */
function typosBetween(a: string, b: string, limit: number): number {
  if (Math.abs(a.length - b.length) > limit) return limit + 1
  let [before, last]: number[][] = [[], []]
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    ;[before, last, row] = [last, row, [i]]
    for (let j = 1; j <= b.length; j++) {
      row[j] = Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1))
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1)
    }
    if (Math.min(...row) > limit) return limit + 1
  }
  return row[b.length]
}
