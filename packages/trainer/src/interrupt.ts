/** @file Ctrl-C: once to finish the step, save and stop; twice to stop at once. */
import { onInterrupt } from './host.ts'

export interface Interrupts {
  /** Aborted by the first Ctrl-C (or SIGTERM), or with the signal that was handed in. */
  readonly signal: AbortSignal
  /** Stops listening. */
  dispose(): void
}

/**
 * @param processSignals listen to SIGINT and SIGTERM of this process, too
 * @param tell is told of one of these: who does not draw progress would see a program that goes on as if nothing had been
 */
export function watchInterrupts(
  given: AbortSignal | undefined,
  processSignals: boolean,
  tell?: (text: string) => void,
): Interrupts {
  const controller = new AbortController()
  const onGiven = () => controller.abort(given?.reason)
  if (given?.aborted) onGiven()
  given?.addEventListener('abort', onGiven, { once: true })
  const onSignal = (name: string) => {
    controller.abort(new Error(name))
    tell?.(`${name}: the training ends after the step under way; once more ends the program\n`)
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

/** What it resolves to; null where it was ended by the signal. */
export async function orInterrupted<T>(signal: AbortSignal, ended: Promise<T>): Promise<T | null> {
  try {
    return await ended
  } catch (error) {
    if (signal.aborted && error === signal.reason) return null
    throw error
  }
}
