/** @file Delivers the events of a run to its listeners. */
import { MoeError, shown } from '@moe/core'
import type { TrainEvent, TrainListener, TrainReporter } from './events.ts'

export class Emitter {
  readonly #listeners: readonly TrainListener[]
  readonly #reporter: TrainReporter
  /** Promises of asynchronous listeners that have not been awaited yet. */
  readonly #pending: Promise<unknown>[] = []

  /** @param step returns the number of steps done, for what listeners log */
  constructor(listeners: readonly TrainListener[], step: () => number) {
    this.#listeners = listeners
    this.#reporter = {
      notify: message => this.emit({ type: 'notice', message }),
      log: values => this.emit({ type: 'log', step: step(), values: checkedNumbers(values) }),
    }
  }

  emit(event: TrainEvent): void {
    for (const listener of this.#listeners) {
      const returned = listener(event, this.#reporter)
      if (!(returned instanceof Promise)) continue
      returned.catch(() => undefined) // A rejection is thrown by `settled`.
      this.#pending.push(returned)
    }
  }

  /** Waits for asynchronous listeners. @throws what one of them rejects with */
  async settled(): Promise<void> {
    while (this.#pending.length > 0) await this.#pending.shift()
  }
}

function checkedNumbers(values: Readonly<Record<string, number>>): Readonly<Record<string, number>> {
  for (const [name, value] of Object.entries(values)) {
    if (typeof value === 'number') continue
    throw new MoeError({
      code: 'E_ATTR',
      op: 'log',
      problem: `${name} is ${shown(value)}`,
      fix: 'pass numbers by name: log({ accuracy: 0.5 })',
    })
  }
  return { ...values }
}
