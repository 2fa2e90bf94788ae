/**
 * @file The arithmetic of group relative policy optimization (GRPO), on the host in f64: from rewards and
 * log-probabilities to the weight of each token.
 *
 * DeepSeek-V3 (report, 5.2.2) maximizes, over groups of G texts o_i that the policy π_old sampled for a prompt q,
 *
 *     J = E 1/G Σ_i ( min(ρ_i A_i, clip(ρ_i, 1 - ε, 1 + ε) A_i) - β D_KL(π_θ ‖ π_ref) )        (26)
 *     D_KL = π_ref/π_θ - log(π_ref/π_θ) - 1                                                   (27)
 *     A_i = (r_i - mean(r_1 … r_G)) / std(r_1 … r_G),   ρ = π_θ/π_old                          (28)
 *
 * for each token, as in DeepSeekMath (arXiv 2402.03300, eq. 3 and 4): ρ, the clip and D_KL are those of a token given its
 * context.
 */

/**
 * Advantages of the texts of a group (eq. 28, with the population standard deviation). If all rewards of a group are
 * equal, its advantages are 0.
 */
export function advantagesOf(rewards: readonly number[]): number[] {
  const mean = meanOf(rewards)
  const deviation = deviationOf(rewards)
  // Ignores differences due to rounding.
  const noise = 1e-9 * Math.max(...rewards.map(Math.abs))
  return rewards.map(reward => (deviation <= noise ? 0 : (reward - mean) / deviation))
}

/** Limits on the distance of the policy from the sampling policy and from a reference. */
export interface PolicyLimits {
  /**
   * ε: a token gets no gradient if its ratio is below 1 - ε in a text that is to become less likely, or above 1 + ε in
   * one that is to become more likely. Two numbers are ε below and above.
   */
  readonly clip: number | readonly [below: number, above: number]
  /** β. */
  readonly klWeight: number
}

/** Log-probabilities of a token, in nats. */
export interface TokenLogProbs {
  /** Under the current policy. */
  readonly now: number
  /** Under the policy that sampled the texts. */
  readonly old: number
  /** Under the reference; if there is none, `klWeight` is 0. */
  readonly reference?: number | undefined
}

/** The contribution of a token to the objective, and its derivative. */
export interface TokenTerm {
  /** min(ρ A, clip(ρ) A) - β D_KL. */
  readonly value: number
  /**
   * Its derivative with respect to log π_θ: ρ A (0 if clipped) + β (π_ref/π_θ - 1). DeepSeekMath, eq. 21, gives it for
   * ρ = 1.
   */
  readonly slope: number
  /** Whether its ratio is clipped. */
  readonly clipped: boolean
  /** D_KL; 0 without a reference. */
  readonly kl: number
}

/** The term of one token in a text with this advantage. */
export function tokenTerm(advantage: number, { now, old, reference }: TokenLogProbs, limits: PolicyLimits): TokenTerm {
  const { clip, klWeight } = limits
  const [below, above] = typeof clip === 'number' ? [clip, clip] : clip
  const ratio = Math.exp(now - old)
  const clipped = advantage > 0 ? ratio > 1 + above : advantage < 0 && ratio < 1 - below
  const bounded = Math.min(Math.max(ratio, 1 - below), 1 + above)
  const kl = reference === undefined ? 0 : divergence(reference - now)
  return {
    value: Math.min(ratio * advantage, bounded * advantage) - klWeight * kl,
    slope: (clipped ? 0 : ratio * advantage) + (reference === undefined ? 0 : klWeight * Math.expm1(reference - now)),
    clipped,
    kl,
  }
}

/** The advantage of a text and the log-probabilities of its tokens, as in `TokenLogProbs`. */
export interface TextLogProbs {
  /** Advantage A of the whole text. */
  readonly advantage: number
  readonly now: ArrayLike<number>
  readonly old: ArrayLike<number>
  readonly reference?: ArrayLike<number> | undefined
}

/** Numbers of texts and tokens. */
export interface TextCounts {
  readonly texts: number
  readonly tokens: number
  /** Tokens of the texts that the step learns from. */
  readonly learned: number
}

/** Sums over the tokens of a text. */
export interface TextTerms {
  /** Its contribution to J, times the number of learned tokens. */
  readonly objective: number
  /** Number of clipped tokens. */
  readonly clipped: number
  readonly kl: number
}

/**
 * Returns the weight of each token's loss, so that the mean over the learned tokens has the gradient of -J, and the
 * terms of each text for `meanTerms`.
 *
 * @param average `'token'` weights every token equally (1/Σ|o_i| Σ_i Σ_t), `'text'` every text (1/N Σ_i 1/|o_i| Σ_t)
 * @param all counts of all texts that J averages over, if there are others: those of other ranks, and those left out
 *   because they contribute nothing
 */
export function tokenWeights(
  texts: readonly TextLogProbs[],
  { average, ...limits }: PolicyLimits & { readonly average: 'token' | 'text' },
  all?: TextCounts,
) {
  const tokens = texts.reduce((sum, { now }) => sum + now.length, 0)
  const whole = all ?? { texts: texts.length, tokens, learned: tokens }
  const terms: TextTerms[] = []
  const weights = texts.map(({ advantage, now, old, reference }) => {
    const share = whole.learned / (average === 'token' ? whole.tokens : whole.texts * now.length)
    const sums = { objective: 0, clipped: 0, kl: 0 }
    const own = Float64Array.from(now, (_, t) => {
      const term = tokenTerm(advantage, { now: now[t], old: old[t], reference: reference?.[t] }, limits)
      sums.objective += share * term.value
      sums.clipped += Number(term.clipped)
      sums.kl += term.kl
      return share * term.slope
    })
    terms.push(sums)
    return own
  })
  return { weights, terms }
}

/** J, the fraction of clipped tokens, and the divergence in nats per token, for texts with `learned` tokens. */
export function meanTerms(terms: readonly TextTerms[], learned: number): TextTerms {
  const mean = (name: keyof TextTerms) => sumOf(terms.map(term => term[name])) / learned
  return { objective: mean('objective'), clipped: mean('clipped'), kl: mean('kl') }
}

/**
 * x - log x - 1 for x = π_ref/π_θ (eq. 27). It is at least 0, and its mean over texts of π_θ is the divergence of π_θ
 * from π_ref. @param logRatio log x
 */
export const divergence = (logRatio: number): number => Math.expm1(logRatio) - logRatio

export const sumOf = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0)

export const meanOf = (values: readonly number[]): number => sumOf(values) / values.length

export function deviationOf(values: readonly number[]): number {
  const mean = meanOf(values)
  return Math.sqrt(meanOf(values.map(x => (x - mean) ** 2)))
}
