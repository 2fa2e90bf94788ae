/** @file Ctrl-C: the first one finishes the step, saves and stops; the second one ends the process at once. */
import { onInterrupt } from './host.ts'

export interface Interrupts {
  /** Aborted by the first Ctrl-C or SIGTERM, or with the signal that was passed in. */
  readonly signal: AbortSignal
  /** Stops listening to signals. */
  dispose(): void
}

/**
 * @param processSignals whether to handle SIGINT and SIGTERM of this process
 * @param report is called with a message when one of them arrives
 */
export function watchInterrupts(
  given: AbortSignal | undefined,
  processSignals: boolean,
  report?: (message: string) => void,
): Interrupts {
  const controller = new AbortController()
  const onGiven = () => controller.abort(given?.reason)
  if (given?.aborted) onGiven()
  given?.addEventListener('abort', onGiven, { once: true })
  const onSignal = (name: string) => {
    controller.abort(new Error(name))
    report?.(`${name}: training stops after the current step; a second signal exits at once`)
  }
  const stopListening = processSignals ? onInterrupt(onSignal) : () => {}
  return {
    signal: controller.signal,
    dispose() {
      given?.removeEventListener('abort', onGiven)
      stopListening()
    },
  }
}

/** Resolves to the result of `ended`, or to null if the signal interrupted it. */
export async function orInterrupted<T>(signal: AbortSignal, ended: Promise<T>): Promise<T | null> {
  try {
    return await ended
  } catch (error) {
    if (signal.aborted && error === signal.reason) return null
    throw error
  }
}
