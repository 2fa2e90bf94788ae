import { expect, test } from 'vitest'
import { assertClose, tolerances } from './compare.ts'

const isClose = (actual: number, expected: number, extra?: number): boolean => {
  try {
    assertClose('x', [actual], [expected], tolerances.sum, extra === undefined ? undefined : [extra])
    return true
  } catch {
    return false
  }
}

test('numbers may differ by the relative and the absolute tolerance, and by what each element may differ more', () => {
  expect([isClose(1e6 + 40, 1e6), isClose(1e6 + 60, 1e6), isClose(1e6 + 60, 1e6, 20)]).toEqual([true, false, true])
  expect([isClose(1e-5, 0), isClose(3e-5, 0)]).toEqual([true, false])
})

test('infinities and NaN are close only to themselves', () => {
  const values = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NaN, 0, 3e38]
  for (const [i, expected] of values.entries())
    expect(values.map(actual => isClose(actual, expected))).toEqual(values.map((_, j) => i === j))
})
