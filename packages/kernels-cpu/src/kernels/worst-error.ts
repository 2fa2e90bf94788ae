/** @file For tests: the largest difference of two arrays. */

/** Largest |a - b| relative to the largest |b| (at least 1e-3); Infinity if one is NaN or infinities differ. */
export function worstError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.POSITIVE_INFINITY
  let worst = 0
  let largest = 1e-3
  for (let i = 0; i < b.length; i++) {
    if (Object.is(a[i], b[i])) continue
    const error = Math.abs(a[i] - b[i])
    if (!Number.isFinite(error)) return Number.POSITIVE_INFINITY
    worst = Math.max(worst, error)
    largest = Math.max(largest, Math.abs(b[i]))
  }
  return worst / largest
}
