/** @file Computes the metrics of a task from those of its items, with standard errors, as lm-evaluation-harness does. */

/** A metric of a task. */
export interface Metric {
  /** The value; NaN if the model's log-probabilities are. */
  readonly value: number
  /** The standard error, with the items as a sample of a larger population; null if undefined (for text tasks, and for a single item). */
  readonly stderr: number | null
}

/** Metrics of an item by name: correctness as 1 or 0, nats, and counts. */
export type ItemMetrics = Readonly<Record<string, number>>

export const mean = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0) / values.length

/** The sample standard deviation divided by the square root of the sample size. */
export function stderrOfMean(values: readonly number[]): number | null {
  if (values.length < 2) return null
  const middle = mean(values)
  const squares = values.reduce((sum, x) => sum + (x - middle) ** 2, 0)
  return Math.sqrt(squares / (values.length - 1)) / Math.sqrt(values.length)
}

const column = (items: readonly ItemMetrics[], name: string) => items.map(item => item[name])

/** The mean of each metric over the items. */
export function means(items: readonly ItemMetrics[]): Record<string, Metric> {
  const metric = (name: string): Metric => {
    const values = column(items, name)
    return { value: mean(values), stderr: stderrOfMean(values) }
  }
  return Object.fromEntries(Object.keys(items[0]).map(name => [name, metric(name)]))
}

/** Accuracy and perplexity, exp of the mean nats per answer. The standard error of the perplexity is computed by the delta method, not by bootstrapping as in the harness. */
export function continuationMetrics(items: readonly ItemMetrics[]): Record<string, Metric> {
  const { acc, nats } = means(items)
  const value = Math.exp(nats.value)
  return { acc, perplexity: { value, stderr: nats.stderr === null ? null : value * nats.stderr } }
}

/** Metrics over all texts together. */
export function textMetrics(items: readonly ItemMetrics[]): Record<string, Metric> {
  const total = (name: string) => column(items, name).reduce((sum, x) => sum + x, 0)
  const nats = total('nats')
  const of = (value: number): Metric => ({ value, stderr: null })
  return {
    word_perplexity: of(Math.exp(nats / total('words'))),
    byte_perplexity: of(Math.exp(nats / total('bytes'))),
    bits_per_byte: of(nats / total('bytes') / Math.LN2),
  }
}

/** The index of the largest value, the first one if several are equal. NaN is larger than all numbers. */
export function largest(values: readonly number[]): number {
  const nan = values.findIndex(Number.isNaN)
  return nan >= 0 ? nan : values.indexOf(Math.max(...values))
}
