// Loaded before a program that has a process group of its own: when the process that started it is gone (killed, crashed), the
// program gets the same SIGINT as from a Ctrl-C, so nothing keeps computing unseen.
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
