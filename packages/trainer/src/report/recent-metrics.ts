/** @file Means of the metrics over the end of a run, for its result. */
import type { MetricsLine } from './metrics-log.ts'

/** The lines of the last tenth of the steps done so far. */
export class RecentMetrics {
  readonly #lines: MetricsLine[] = []
  /** Names of the numbers that the model's `afterStep` returns. */
  readonly #balance = new Set<string>()

  add(line: MetricsLine): void {
    const lines = this.#lines
    lines.push(line)
    while (lines[0].step <= line.step * 0.9) lines.shift()
  }

  addBalanceNames(names: Iterable<string>): void {
    for (const name of names) this.#balance.add(name)
  }

  get balanceNames(): string[] {
    return [...this.#balance]
  }

  /** Mean of the losses in nats per predicted token. */
  get trainingLoss(): number {
    return mean(this.#lines.map(({ nll }) => nll))
  }

  /** Means of the numbers that `afterStep` returned. */
  get balance(): Record<string, number> {
    return Object.fromEntries(
      this.balanceNames.map(name => [name, mean(this.#lines.flatMap(line => line[name] ?? []))]),
    )
  }
}

const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length
