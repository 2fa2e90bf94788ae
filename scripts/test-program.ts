/** @file For tests only: starts programs and sends them signals, as a terminal does. */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'

const windows = process.platform === 'win32'
const preload = ['--import', new URL('signals-by-message.mjs', import.meta.url).href]

/** Starts Node with these arguments, with pipes for input and output. */
export function startProgram(args: readonly string[]): ChildProcessWithoutNullStreams {
  if (!windows) return spawn(process.execPath, args)
  const stdio = ['pipe', 'pipe', 'pipe', 'ipc'] as const
  return spawn(process.execPath, [...preload, ...args], { stdio: [...stdio] }) as ChildProcessWithoutNullStreams
}

/** Sends a signal; on Windows as a message, because there `kill` terminates a program immediately, whatever the signal. */
export function sendSignal(program: ChildProcessWithoutNullStreams, name: NodeJS.Signals): void {
  if (windows) program.send(name)
  else program.kill(name)
}
