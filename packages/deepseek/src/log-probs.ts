/** @file Log-probabilities of tokens. */
import { fromHost, keep, MoeError, noGrad, type Precision, scope, shown, type Tensor } from '@moe/core'
import type { Network } from './network.ts'

/** A token and its log-probability. */
export interface LogProb {
  /** Token id. */
  readonly token: number
  /** Natural logarithm of the probability; at most 0. */
  readonly logProb: number
}

/** The log-probability of a token, from unmodified logits: independent of temperature, penalties and truncation. */
export interface TokenLogProb extends LogProb {
  /** The requested number of most likely tokens, in decreasing order; ties by id. */
  readonly top: readonly LogProb[]
}

/** Maximum number of prompt logits in memory at a time. Tests reduce it. */
export const limits = { logits: 2 ** 24 }

/** @throws MoeError E_ATTR */
export function checkTop(op: string, name: string, top: number | undefined): void {
  if (top === undefined || (Number.isInteger(top) && top >= 0)) return
  const problem = `expected a number of tokens for ${name}, got ${shown(top)}`
  throw new MoeError({ code: 'E_ATTR', op, problem, fix: 'pass 0 or a positive integer' })
}

/** Returns the log-probabilities of N tokens from the first N rows of logits `[rows, V]`. */
export async function logProbsOf(logits: Tensor, tokens: readonly number[], top: number): Promise<TokenLogProb[]> {
  const vocabulary = logits.shape[1]
  const most = Math.min(top, vocabulary)
  const { own, values, indices } = keep(
    noGrad(() =>
      scope(() => {
        const rows = logits.narrow(0, 0, tokens.length)
        const largest = rows.max(-1, true)
        const shares = rows.sub(largest).exp().sum(-1, true).log()
        const at = Int32Array.from(tokens, (token, i) => i * vocabulary + token)
        const chosen = rows.reshape([rows.size, 1]).takeRows(fromHost(at, [at.length], 'i32', logits.backend))
        const own = chosen.sub(largest).sub(shares)
        if (most === 0) return { own }
        const { values, indices } = rows.topk(most)
        return { own, values: values.sub(largest).sub(shares), indices }
      }),
    ) as { own: Tensor; values?: Tensor; indices?: Tensor },
  )
  try {
    const [of, likeliest, ids] = await Promise.all([own.values(), values?.values(), indices?.values()])
    const topOf = (i: number) =>
      Array.from({ length: most }, (_, j) => ({
        token: (ids as Int32Array)[i * most + j],
        logProb: (likeliest as Float32Array)[i * most + j],
      }))
    return tokens.map((token, i) => ({ token, logProb: of[i], top: topOf(i) }))
  } finally {
    for (const tensor of [own, values, indices]) tensor?.dispose()
  }
}

/** Returns the log-probabilities of tokens from the hidden states before them, which are the rows `states` of `hidden [..., D]`. */
export async function logProbsAt(
  model: Network,
  hidden: Tensor,
  tokens: readonly number[],
  {
    states,
    top,
    precision,
  }: { readonly states: readonly number[]; readonly top: number; readonly precision: Precision },
): Promise<TokenLogProb[]> {
  const { hidden_size: features, vocab_size: vocabulary } = model.config
  const rows = Math.max(1, Math.floor(limits.logits / vocabulary))
  const flat = [hidden.size / features, features]
  const result: TokenLogProb[] = []
  for (let start = 0; start < tokens.length; start += rows) {
    const end = Math.min(tokens.length, start + rows)
    const index = Int32Array.from(states.slice(start, end))
    const chosen = () => hidden.reshape(flat).takeRows(fromHost(index, [index.length], 'i32', hidden.backend))
    const logits = keep(model.infer(() => model.lm_head.forward(chosen()), { precision }))
    try {
      result.push(...(await logProbsOf(logits, tokens.slice(start, end), top)))
    } finally {
      logits.dispose()
    }
  }
  return result
}

/** The same for consecutive hidden states, starting with row `from`. */
export function logProbsBehind(
  model: Network,
  hidden: Tensor,
  tokens: readonly number[],
  { from, top, precision }: { readonly from: number; readonly top: number; readonly precision: Precision },
): Promise<TokenLogProb[]> {
  return logProbsAt(model, hidden, tokens, { states: Array.from(tokens, (_, i) => from + i), top, precision })
}
