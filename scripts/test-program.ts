/** @file For tests only: programs that get signals, as from a terminal. */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'

const windows = process.platform === 'win32'
const preload = ['--import', new URL('signals-by-message.mjs', import.meta.url).href]

/** Starts Node with these arguments; what the program reads and writes goes by pipes. */
export function startProgram(args: readonly string[]): ChildProcessWithoutNullStreams {
  if (!windows) return spawn(process.execPath, args)
  const stdio = ['pipe', 'pipe', 'pipe', 'ipc'] as const
  return spawn(process.execPath, [...preload, ...args], { stdio: [...stdio] }) as ChildProcessWithoutNullStreams
}

/** On Windows `kill` ends a program at once, whatever the signal. */
export function sendSignal(program: ChildProcessWithoutNullStreams, name: NodeJS.Signals): void {
  if (windows) program.send(name)
  else program.kill(name)
}
