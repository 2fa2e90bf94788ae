/**
 * @file Compares arrays of numbers, with tolerances by kind of op and messages that show where and how much they
 * differ.
 */

/** How much two numbers may differ. */
export interface Tolerance {
  /** |actual - expected| may be up to `relative * |expected| + absolute`. */
  readonly relative: number
  /** Tolerance that applies even if the expected number is zero. */
  readonly absolute: number
}

/** Tolerances for all backends. A case that needs a wider one says why. */
export const tolerances = {
  exact: { relative: 0, absolute: 0 },
  elementwise: { relative: 1e-5, absolute: 1e-6 },
  sum: { relative: 5e-5, absolute: 2e-5 },
  gradient: { relative: 1e-4, absolute: 2e-5 },
  bf16: { relative: 2e-2, absolute: 2e-2 },
} as const satisfies Record<string, Tolerance>

/** Returns the normalized mean square error: sum((a - e)^2) / sum(e^2). */
export function normalizedError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let error = 0
  let power = 0
  for (let i = 0; i < expected.length; i++) {
    if (!Number.isFinite(expected[i])) continue
    error += (actual[i] - expected[i]) ** 2
    power += expected[i] ** 2
  }
  return power === 0 ? error : error / power
}

/**
 * Throws an Error with the first five differing positions if arrays differ by more than the tolerance. NaN equals NaN,
 * and infinities equal themselves.
 * @param extra additional tolerance of each element. Default: none
 */
export function assertClose(
  label: string,
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance: Tolerance = tolerances.elementwise,
  extra?: ArrayLike<number>,
): void {
  if (actual.length !== expected.length) {
    throw new Error(`${label}: ${actual.length} values, expected ${expected.length}`)
  }
  const wrong: string[] = []
  let count = 0
  let largest = 0
  for (let i = 0; i < expected.length; i++) {
    const a = actual[i]
    const e = expected[i]
    if (Object.is(a, e) || a === e || (Number.isNaN(a) && Number.isNaN(e))) continue
    const difference = Math.abs(a - e)
    const more = extra?.[i] ?? 0
    // Relative to an infinity, everything would be close.
    const relative = Number.isFinite(e) ? tolerance.relative * Math.abs(e) : 0
    if (difference <= relative + tolerance.absolute + more) continue
    count++
    if (!(difference <= largest)) largest = difference
    if (wrong.length < 5) {
      const wider = more === 0 ? '' : `, allowed ${more.toPrecision(3)} more`
      wrong.push(`  [${i}] ${a}, expected ${e} (off by ${difference.toPrecision(3)}${wider})`)
    }
  }
  if (count === 0) return
  throw new Error(
    `${label}: ${count} of ${expected.length} values differ (largest ${largest.toPrecision(3)}; allowed ${tolerance.relative} relative + ${tolerance.absolute})\n${wrong.join('\n')}`,
  )
}
