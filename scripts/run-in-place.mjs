// Runs a program in place of this one, with the same terminal, exit code and signals.
import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/** Repeated signals within this time count as one: a terminal signals every process of the group, and npm forwards the signal too. */
const sameSignalMs = 500

/**
 * Resolves when the program has ended. This process then has the program's exit code, or dies of the same signal.
 *
 * With `ownGroup`, the program gets its own process group, so that Ctrl-C reaches it once, through this process, however it was sent (terminal,
 * `kill`, `timeout`, npm). To a training run, one Ctrl-C means "save and stop" and a second one "stop now". The program also ends if this process is
 * killed (exit-with-parent.mjs).
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
    // On Windows the console signals every process itself; this process only waits for the program to end.
    if (!repeated && process.platform !== 'win32') child.kill(signal)
  }
  const signals = ['SIGINT', 'SIGTERM', 'SIGHUP']
  for (const signal of signals) process.on(signal, forward)
  if (separate) {
    // Ctrl-Z and `fg`: the terminal only stops and continues this process's group.
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
