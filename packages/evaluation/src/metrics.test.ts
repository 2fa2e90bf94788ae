import { expect, test } from 'vitest'
import { continuationMetrics, largest, means, stderrOfMean, textMetrics } from './metrics.ts'

test('means have standard errors from the sample standard deviation', () => {
  // The mean is 3/4. Squared deviations sum to 12/16; divided by 3 and by 4 they give 1/16.
  expect(means([{ acc: 1 }, { acc: 0 }, { acc: 1 }, { acc: 1 }])).toEqual({ acc: { value: 0.75, stderr: 0.25 } })
  expect(stderrOfMean([1, 2, 3, 4])).toBeCloseTo(Math.sqrt(5 / 3) / 2, 15)
  expect(stderrOfMean([1])).toBeNull()
  expect(means([{ acc: 1 }])).toEqual({ acc: { value: 1, stderr: null } })
  expect(means([{ acc: 1 }, { acc: Number.NaN }]).acc.value).toBeNaN()
})

test('the perplexity of answers is exp of the mean nats per answer', () => {
  const { acc, perplexity } = continuationMetrics([
    { acc: 1, nats: Math.log(2) },
    { acc: 0, nats: Math.log(8) },
  ])
  expect(acc.value).toBe(0.5)
  expect(perplexity.value).toBeCloseTo(4, 12)
  // The standard error of the mean of ln 2 and ln 8 is half their distance, ln 2.
  expect(perplexity.stderr).toBeCloseTo(4 * Math.LN2, 12)
})

test('texts are weighted by their words and bytes', () => {
  const metrics = textMetrics([
    { nats: 3 * Math.LN2, words: 1, bytes: 2, tokens: 1 },
    { nats: 5 * Math.LN2, words: 3, bytes: 14, tokens: 1 },
  ])
  expect(metrics.word_perplexity.value).toBeCloseTo(4, 12)
  expect(metrics.byte_perplexity.value).toBeCloseTo(Math.SQRT2, 12)
  expect(metrics.bits_per_byte).toEqual({ value: 0.5, stderr: null })
})

test('largest returns the first of equal values, also beside NaN', () => {
  expect(largest([-3, -1, -1])).toBe(1)
  expect(largest([-Infinity, -Infinity])).toBe(0)
  expect(largest([-1, Number.NaN])).toBe(1)
  expect(largest([Number.NaN, 1])).toBe(0)
})
