/** @file What the sizes of a schedule must be. */
import { MoeError } from '@moe/core'

/** @throws MoeError E_CONFIG with every fault; `rules` are faults and whether each holds */
export function checkSizes(
  op: string,
  sizes: Readonly<Record<string, number>>,
  rules: ReadonlyArray<readonly [fault: string, wrong: boolean]> = [],
): void {
  const uncounted = Object.entries(sizes).filter(([, size]) => !Number.isSafeInteger(size) || size < 1)
  const problems =
    uncounted.length > 0
      ? uncounted.map(([name, size]) => `${name} is ${size}, needs a whole number from 1`)
      : rules.flatMap(([fault, wrong]) => (wrong ? [fault] : []))
  if (problems.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: problems.join('; '),
    fix: 'change these numbers, or take another schedule',
    details: { ...sizes, problems },
  })
}
