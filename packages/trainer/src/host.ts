/** @file What the process gives that trains: standard error, signals, its memory. A page has no process. */
import type { ProgressStream } from './report/progress.ts'

// By way of `globalThis`: what bundlers put into the place of `process` is no process.
const process: NodeJS.Process | undefined =
  globalThis.process?.versions?.node === undefined ? undefined : globalThis.process

const consoleStream: ProgressStream = { write: text => console.log(text.trimEnd()) }

/** Standard error; in a page the console, which takes lines. */
export const standardError = (): ProgressStream => process?.stderr ?? consoleStream

/** Whether NO_COLOR is set. */
export const isColorless = (): boolean => Boolean(process?.env['NO_COLOR'])

/** Largest resident memory so far; 0 where nobody says. */
export const peakResidentBytes = (): number =>
  // It counts kilobytes.
  (process?.resourceUsage().maxRSS ?? 0) * 1024

const exitCodes = { SIGINT: 130, SIGTERM: 143 } as const

type Signal = keyof typeof exitCodes

/** Calls back for the first SIGINT or SIGTERM; a second one ends the process. @returns stops listening */
export function onInterrupt(interrupted: (name: Signal) => void): () => void {
  let seen = 0
  const listener = (name: NodeJS.Signals) => {
    seen++
    if (seen > 1) process?.exit(exitCodes[name as Signal])
    interrupted(name as Signal)
  }
  const names = Object.keys(exitCodes) as Signal[]
  for (const name of names) process?.on(name, listener)
  return () => {
    for (const name of names) process?.off(name, listener)
  }
}
