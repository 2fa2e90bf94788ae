// Runs a program as if it had been started in place of this one: same terminal, exit code and signals.
import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/** Two signals of one kind closer than this are one: a terminal signals every process of the group, and npm hands on what it gets. */
const sameSignalMs = 500

/**
 * Resolves when the program has ended; this process then has the program's exit code, or dies of the same signal.
 *
 * With `ownGroup`, the program gets a process group of its own, so that a Ctrl-C reaches it once, through us, however it was
 * sent (terminal, `kill`, `timeout`, npm): one means "save and stop" to a training run, a second one "stop now". It ends
 * with us even when we are killed (exit-with-parent.mjs).
 */
export function runInPlace(node, args, { ownGroup }) {
  const separate = ownGroup && process.platform !== 'win32'
  const preload = separate ? ['--import', fileURLToPath(new URL('exit-with-parent.mjs', import.meta.url))] : []
  const child = spawn(node, [...preload, ...args], { stdio: 'inherit', detached: separate })
  const last = new Map()
  const forward = signal => {
    const now = performance.now()
    const repeated = now - (last.get(signal) ?? Number.NEGATIVE_INFINITY) < sameSignalMs
    last.set(signal, now)
    // On Windows the console tells every process itself; we only stay alive until the program has ended.
    if (!repeated && process.platform !== 'win32') child.kill(signal)
  }
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP']
  for (const signal of signals) process.on(signal, forward)
  if (separate) {
    // Ctrl-Z and `fg`: the terminal stops and continues our group only.
    process.on('SIGTSTP', () => {
      child.kill('SIGSTOP')
      process.kill(process.pid, 'SIGSTOP')
    })
    process.on('SIGCONT', () => child.kill('SIGCONT'))
  }
  return new Promise((resolve, reject) => {
    child.on('error', reject)
    child.on('exit', (code, signal) => {
      for (const name of signals) process.off(name, forward)
      if (signal) process.kill(process.pid, signal)
      else process.exitCode = code ?? 1
      resolve()
    })
  })
}
