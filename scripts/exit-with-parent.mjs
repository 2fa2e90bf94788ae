// Preloaded by a program that has its own process group: when the process that started it dies (killed, crashed), the program receives
// SIGINT, as from Ctrl-C, so that it does not keep running unnoticed.
import { isMainThread } from 'node:worker_threads'

if (isMainThread) {
  const parent = process.ppid
  const timer = setInterval(() => {
    if (process.ppid === parent) return
    clearInterval(timer)
    process.kill(process.pid, 'SIGINT')
  }, 1000)
  timer.unref()
}
