/** @file Validation of the sizes of a schedule. */
import { MoeError } from '@moe/core'

/**
 * Checks that all sizes are positive integers, and then the rules.
 * @param rules messages, each with whether its rule is violated
 * @throws MoeError E_CONFIG with all faults
 */
export function checkSizes(
  op: string,
  sizes: Readonly<Record<string, number>>,
  rules: ReadonlyArray<readonly [fault: string, violated: boolean]> = [],
): void {
  const invalid = Object.entries(sizes).filter(([, size]) => !Number.isSafeInteger(size) || size < 1)
  const problems =
    invalid.length > 0
      ? invalid.map(([name, size]) => `${name} is ${size}, needs a positive integer`)
      : rules.flatMap(([fault, violated]) => (violated ? [fault] : []))
  if (problems.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: problems.join('; '),
    fix: 'change these numbers, or use another schedule',
    details: { ...sizes, problems },
  })
}
