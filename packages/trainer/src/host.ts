/** @file The training process: standard error, signals, memory. In a browser there is no process. */

/** The stream methods that `progress` uses; `process.stderr` has them. */
export interface ProgressStream {
  /** Writes text, including control characters if `isTTY` is true. */
  write(text: string): unknown
  /** Whether the stream is a terminal, whose last line can be redrawn. Default false. */
  readonly isTTY?: boolean
  /** Width of the terminal in characters. Default 100. */
  readonly columns?: number
  /** Registers an error listener on a Node stream, for example for a closed pipe. */
  on?(event: 'error', listener: (error: Error) => void): unknown
}

// Read from `globalThis`, because bundlers replace a bare `process`.
const process: NodeJS.Process | undefined =
  globalThis.process?.versions?.node === undefined ? undefined : globalThis.process

const consoleStream: ProgressStream = { write: text => console.log(text.trimEnd()) }

/** Standard error, or the console in a browser. */
export const standardError = (): ProgressStream => process?.stderr ?? consoleStream

/** Whether NO_COLOR is set. */
export const isColorless = (): boolean => Boolean(process?.env['NO_COLOR'])

/** Peak resident memory of this process; 0 if it is unknown. */
export const peakResidentBytes = (): number =>
  // maxRSS is in kilobytes.
  (process?.resourceUsage().maxRSS ?? 0) * 1024

const exitCodes = { SIGINT: 130, SIGTERM: 143 } as const

type Signal = keyof typeof exitCodes

/** Signals within this time count as one: `timeout` and some launchers signal the process and then its group. */
const sameSignalMs = 500

/** Calls `interrupted` on the first SIGINT or SIGTERM; a later one ends the process. @returns stops listening */
export function onInterrupt(interrupted: (name: Signal) => void): () => void {
  let firstAt: number | undefined
  const listener = (name: NodeJS.Signals) => {
    const now = performance.now()
    if (firstAt === undefined) {
      firstAt = now
      interrupted(name as Signal)
    } else if (now - firstAt >= sameSignalMs) process?.exit(exitCodes[name as Signal])
  }
  const names = Object.keys(exitCodes) as Signal[]
  for (const name of names) process?.on(name, listener)
  return () => {
    for (const name of names) process?.off(name, listener)
  }
}
