/** @file Means of the metrics over the end of a run, for its result. */
import type { MetricsLine } from './metrics-log.ts'

/** The lines of the last tenth of the steps done so far. */
export class RecentMetrics {
  /** The lines, after `#stale` older ones, which are removed together: removing each would move all others. */
  readonly #lines: MetricsLine[] = []
  #stale = 0
  /** Names of the numbers that the model's `afterStep` returns. */
  readonly #balance = new Set<string>()

  add(line: MetricsLine): void {
    const lines = this.#lines
    lines.push(line)
    while (lines[this.#stale].step <= line.step * 0.9) this.#stale++
    if (this.#stale <= lines.length / 2) return
    lines.splice(0, this.#stale)
    this.#stale = 0
  }

  get #recent(): readonly MetricsLine[] {
    return this.#lines.slice(this.#stale)
  }

  addBalanceNames(names: Iterable<string>): void {
    for (const name of names) this.#balance.add(name)
  }

  get balanceNames(): string[] {
    return [...this.#balance]
  }

  /** Mean of the losses in nats per predicted token. */
  get trainingLoss(): number {
    return mean(this.#recent.map(({ nll }) => nll))
  }

  /** Means of the numbers that `afterStep` returned. */
  get balance(): Record<string, number> {
    const recent = this.#recent
    return Object.fromEntries(this.balanceNames.map(name => [name, mean(recent.flatMap(line => line[name] ?? []))]))
  }
}

const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length
