/** @file From what items came to, to numbers with standard errors, as lm-evaluation-harness has them. */

/** A number of a task. */
export interface Metric {
  /** Its value; NaN where the model's numbers are. */
  readonly value: number
  /** Standard error of it, were the items drawn from many more; null where there is none (of whole texts, and of one item). */
  readonly stderr: number | null
}

/** Results of an item, by name: 1 or 0 for right or wrong, nats and counts. */
export type ItemMetrics = Readonly<Record<string, number>>

export const mean = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0) / values.length

/** The sample's standard deviation over the root of its size. */
export function stderrOfMean(values: readonly number[]): number | null {
  if (values.length < 2) return null
  const middle = mean(values)
  const squares = values.reduce((sum, x) => sum + (x - middle) ** 2, 0)
  return Math.sqrt(squares / (values.length - 1)) / Math.sqrt(values.length)
}

const column = (items: readonly ItemMetrics[], name: string) => items.map(item => item[name])

/** Means of all that items have. */
export function means(items: readonly ItemMetrics[]): Record<string, Metric> {
  const metric = (name: string): Metric => {
    const values = column(items, name)
    return { value: mean(values), stderr: stderrOfMean(values) }
  }
  return Object.fromEntries(Object.keys(items[0]).map(name => [name, metric(name)]))
}

/** Accuracy, and the perplexity of an answer: exp of the mean of its nats. Its error is that of the mean times its slope, where the harness draws samples. */
export function continuationMetrics(items: readonly ItemMetrics[]): Record<string, Metric> {
  const { acc, nats } = means(items)
  const value = Math.exp(nats.value)
  return { acc, perplexity: { value, stderr: nats.stderr === null ? null : value * nats.stderr } }
}

/** Of all texts as one. */
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

/** Number of the largest, the first of equals; NaN is larger than all. */
export function largest(values: readonly number[]): number {
  const nan = values.findIndex(Number.isNaN)
  return nan >= 0 ? nan : values.indexOf(Math.max(...values))
}
