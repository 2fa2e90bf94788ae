/** @file Ctrl-C: once to finish the step, save and stop; twice to stop at once. */
import { onInterrupt } from './host.ts'

export interface Interrupts {
  /** Aborted by the first Ctrl-C (or SIGTERM), or with the signal that was handed in. */
  readonly signal: AbortSignal
  /** Stops listening. */
  dispose(): void
}

/** @param processSignals listen to SIGINT and SIGTERM of this process, too */
export function watchInterrupts(given: AbortSignal | undefined, processSignals: boolean): Interrupts {
  const controller = new AbortController()
  const onGiven = () => controller.abort(given?.reason)
  if (given?.aborted) onGiven()
  given?.addEventListener('abort', onGiven, { once: true })
  const stopListening = processSignals ? onInterrupt(name => controller.abort(new Error(name))) : () => {}
  return {
    signal: controller.signal,
    dispose() {
      given?.removeEventListener('abort', onGiven)
      stopListening()
    },
  }
}
