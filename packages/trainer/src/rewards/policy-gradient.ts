/**
 * @file The arithmetic of group relative policy optimization (GRPO), on the host in doubles: from rewards and log-probabilities to what each token is weighed with.
 *
 * DeepSeek-V3 (report, 5.2.2) maximizes, over groups of G texts o_i that the policy π_old made for a prompt q,
 *
 *     J = E 1/G Σ_i ( min(ρ_i A_i, clip(ρ_i, 1 - ε, 1 + ε) A_i) - β D_KL(π_θ ‖ π_ref) )        (26)
 *     D_KL = π_ref/π_θ - log(π_ref/π_θ) - 1                                                   (27)
 *     A_i = (r_i - mean(r_1 … r_G)) / std(r_1 … r_G),   ρ = π_θ/π_old                          (28)
 *
 * by token as in DeepSeekMath (arXiv 2402.03300, eq. 3 and 4): ρ, the clip and D_KL are those of each token, given what stands before it.
 */

/** Advantages of the texts of a group, from their rewards: eq. 28, with the standard deviation of just these. A group whose rewards are all equal says nothing about what is better: its advantages are 0. */
export function advantagesOf(rewards: readonly number[]): number[] {
  const mean = meanOf(rewards)
  const deviation = deviationOf(rewards)
  // Sums that were rounded in another order are no difference.
  const noise = 1e-9 * Math.max(...rewards.map(Math.abs))
  return rewards.map(reward => (deviation <= noise ? 0 : (reward - mean) / deviation))
}

/** How far the policy may go from the one that made the texts, and from a reference. */
export interface PolicyLimits {
  /** ε: a token whose ratio is below 1 - ε in a text that is to become less likely, or above 1 + ε in one that is to become likelier, gives no gradient. Two numbers are ε below and above. */
  readonly clip: number | readonly [below: number, above: number]
  /** β. */
  readonly klWeight: number
}

/** How likely a token is, in nats. */
export interface TokenLogProbs {
  /** By the policy as it is. */
  readonly now: number
  /** By the policy that made the texts. */
  readonly old: number
  /** By the reference; where there is none, `klWeight` is 0. */
  readonly reference?: number | undefined
}

/** What a token adds to the objective, and how it changes with its log-probability. */
export interface TokenTerm {
  /** min(ρ A, clip(ρ) A) - β D_KL. */
  readonly value: number
  /** Its derivative by log π_θ: ρ A (0 where that is clipped) + β (π_ref/π_θ - 1). DeepSeekMath, eq. 21, has it for ρ = 1. */
  readonly slope: number
  /** Whether its ratio is clipped. */
  readonly clipped: boolean
  /** D_KL; 0 without a reference. */
  readonly kl: number
}

/** One token of a text with this advantage. */
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

/** What is known of the tokens of a text: log-probabilities of each, as in `TokenLogProbs`. */
export interface TextLogProbs {
  /** A of the whole text. */
  readonly advantage: number
  readonly now: ArrayLike<number>
  readonly old: ArrayLike<number>
  readonly reference?: ArrayLike<number> | undefined
}

/** How many there are. */
export interface TextCounts {
  readonly texts: number
  readonly tokens: number
  /** Tokens of those that the step reads. */
  readonly learned: number
}

/** Sums over the tokens of a text. */
export interface TextTerms {
  /** What it adds to J, times the tokens that are learned. */
  readonly objective: number
  /** How many are clipped. */
  readonly clipped: number
  readonly kl: number
}

/**
 * What the loss of each token of some texts is multiplied by, so that the mean over the tokens that are learned has the gradient of -J; and what each text adds to the numbers of `meanTerms`.
 * @param average `'token'` counts every token alike (1/Σ|o_i| Σ_i Σ_t), `'text'` every text (1/N Σ_i 1/|o_i| Σ_t)
 * @param all texts that J is a mean over, where there are others than these: other ranks', and some that are left out as they add nothing to it
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

/** J, the share of clipped tokens, and the divergence in nats per token, of texts of `learned` tokens. */
export function meanTerms(terms: readonly TextTerms[], learned: number): TextTerms {
  const mean = (name: keyof TextTerms) => sumOf(terms.map(term => term[name])) / learned
  return { objective: mean('objective'), clipped: mean('clipped'), kl: mean('kl') }
}

/** x = π_ref/π_θ makes x - log x - 1: at least 0, and its mean over texts of π_θ is the divergence of π_θ from π_ref (eq. 27). @param logRatio log x */
export const divergence = (logRatio: number): number => Math.expm1(logRatio) - logRatio

export const sumOf = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0)

export const meanOf = (values: readonly number[]): number => sumOf(values) / values.length

export function deviationOf(values: readonly number[]): number {
  const mean = meanOf(values)
  return Math.sqrt(meanOf(values.map(x => (x - mean) ** 2)))
}
