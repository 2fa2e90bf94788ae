/** @file Ctrl-C: once to finish the step, save and stop; twice to stop at once. */

export interface Interrupts {
  /** Aborted by the first Ctrl-C (or SIGTERM), or with the signal that was handed in. */
  readonly signal: AbortSignal
  /** Stops listening. */
  dispose(): void
}

const exitCodes = { SIGINT: 130, SIGTERM: 143 } as const

/** @param processSignals listen to SIGINT and SIGTERM of this process, too */
export function watchInterrupts(given: AbortSignal | undefined, processSignals: boolean): Interrupts {
  const controller = new AbortController()
  const onGiven = () => controller.abort(given?.reason)
  if (given?.aborted) onGiven()
  given?.addEventListener('abort', onGiven, { once: true })
  let seen = 0
  const onProcess = (name: NodeJS.Signals) => {
    seen++
    if (seen > 1) process.exit(exitCodes[name as keyof typeof exitCodes])
    controller.abort(new Error(name))
  }
  const names = processSignals ? (Object.keys(exitCodes) as Array<keyof typeof exitCodes>) : []
  for (const name of names) process.on(name, onProcess)
  return {
    signal: controller.signal,
    dispose() {
      given?.removeEventListener('abort', onGiven)
      for (const name of names) process.off(name, onProcess)
    },
  }
}
